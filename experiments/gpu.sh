#!/bin/bash
# What only a GPU can tell: bash experiments/gpu.sh tests|bench|scale FOLDER [ARMS]. Each part ends by itself in 10
# minutes and leaves its output in FOLDER; bench and scale, called again, go on with what is there. scale wants
# data/linux.txt, or the same as linux.txt.xz, and trains the ARMS (compare.py --help), or all. Where the code is without
# git, COMMIT in the environment names it.
set -u
part=${1:-} out=${2:-}
[ -n "$out" ] || { echo "gpu.sh: name a part (tests, bench or scale) and a folder" >&2; exit 2; }
mkdir -p "$out"
runs=out-compare            # with the checkpoints, which are too large to bring home
case $part in
    tests) timeout 580 python -m pytest tests/test_cuda.py -v -s > "$out/test_cuda.txt" 2>&1; tail -40 "$out/test_cuda.txt" ;;
    bench) timeout 590 python experiments/bench.py --preset gpu --results "$out" ;;
    scale) [ -e data/linux.txt ] || xz --decompress --keep data/linux.txt.xz || exit
           only=()
           [ -z "${3:-}" ] || only=(--arms "$3")
           timeout 450 python experiments/compare.py --preset scale --processes 7 --runs "$runs" --results "$out" "${only[@]}"
           python experiments/compare.py --preset scale --processes 7 --train false --runs "$runs" --results "$out" &
           bubbles=$(echo "$runs"/bubbles__r___2_0_*/)
           python experiments/figures.py --figure kinds --budget 1.5,2 --out_dir "$bubbles" --results "$out" &
           python sample.py --out_dir "$bubbles" --budget 1.5 --max_new_tokens 300 --plot "$out/function.png" \
               --prompt $'\nstatic int find_free_slot(struct table *table, u32 key)\n{\n' &
           wait ;;
    *) echo "gpu.sh: no part called $part; there are tests, bench and scale" >&2; exit 2 ;;
esac
