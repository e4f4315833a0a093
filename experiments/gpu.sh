#!/bin/bash
# What only a GPU can tell: bash experiments/gpu.sh tests|bench|plays FOLDER. Each part ends by itself in 10 minutes and
# leaves its output in FOLDER; bench and plays, called again, go on with what is there.
set -u
part=${1:-} out=${2:-}
[ -n "$out" ] || { echo "gpu.sh: name a part (tests, bench or plays) and a folder" >&2; exit 2; }
mkdir -p "$out"
case $part in
    tests) timeout 580 python -m pytest tests/test_cuda.py -v -s > "$out/test_cuda.txt" 2>&1; tail -40 "$out/test_cuda.txt" ;;
    bench) timeout 590 python experiments/bench.py --preset gpu --results "$out" ;;
    plays) timeout 560 python experiments/compare.py --preset gpu --processes 4 --runs "$out/runs" --results "$out"
           python experiments/compare.py --preset gpu --train false --runs "$out/runs" --results "$out" ;;
    *) echo "gpu.sh: no part called $part; there are tests, bench and plays" >&2; exit 2 ;;
esac
