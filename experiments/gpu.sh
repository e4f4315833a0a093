#!/bin/bash
# What only a GPU can tell: bash experiments/gpu.sh tests|bench|plays|compare FOLDER. Each part ends by itself in 10
# minutes and leaves its output in FOLDER; bench and compare, run again, go on (with what out-bench, out-compare hold).
set -u
part=${1:-} out=${2:-}
[ -n "$out" ] || { echo "gpu.sh: name a part (tests, bench, plays or compare) and a folder" >&2; exit 2; }
mkdir -p "$out"
case $part in
    tests) timeout 580 python -m pytest tests/test_cuda.py -v -s > "$out/test_cuda.txt" 2>&1; tail -40 "$out/test_cuda.txt" ;;
    bench) timeout 590 python experiments/bench.py --preset gpu --resume --minutes 8 --results out-bench
        cp out-bench/* "$out" ;;
    plays) timeout 580 python experiments/ablate.py --task plays-10m --seeds 0,1,2 --processes 1 --runs "$out/runs" \
               --results "$out" --arms "plain GPT; GPT of as many FLOPs; copy-2; bubbles; bubbles, r = 1.5; bubbles, r = 4" ;;
    compare) timeout 595 python experiments/compare.py --preset gpu --minutes 7 --results "$out" ;;
    *) echo "gpu.sh: no part called $part; there are tests, bench, plays and compare" >&2; exit 2 ;;
esac
