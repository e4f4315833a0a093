#!/bin/bash
# What only a GPU can tell: bash experiments/gpu.sh tests|bench|scale|size-3M FOLDER [ARMS]. Each part ends by itself in
# 10 minutes and leaves its output in FOLDER; all but tests, called again, go on with what is there. scale and size-3M
# want data/linux.txt, or the same as linux.txt.xz; scale trains the ARMs (those of compare.py), or all. Where the code is
# without git, COMMIT in the environment names it.
set -u
part=${1:-} out=${2:-}
case $part in tests|bench|scale|size-3M) ;; *) out= ;; esac
[ -n "$out" ] || { echo 'usage: gpu.sh tests|bench|scale|size-3M FOLDER ["ARM; ARM"], with a folder for the results' >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 2
compare=(python experiments/compare.py --processes 8 --runs out-compare --results "$out" --preset)
if [ $part = scale ] || [ $part = size-3M ]; then
    [ -e data/linux.txt ] || [ ! -e data/linux.txt.xz ] || xz --decompress --keep data/linux.txt.xz
    [ -e data/linux.txt ] || { echo "gpu.sh: there is no data/linux.txt; make it with experiments/linux.py" >&2; exit 2; }
fi
case $part in
    tests) timeout 580 python -m pytest tests/test_cuda.py -v -s > "$out/test_cuda.txt" 2>&1
           passed=$?
           tail -40 "$out/test_cuda.txt"
           exit $passed ;;
    bench) timeout 590 python experiments/bench.py --preset gpu --results "$out" ;;
    size-3M) timeout 500 "${compare[@]}" size-3M || [ $? = 124 ] || exit 1
             "${compare[@]}" size-3M --train false ;;
    scale) only=()
           [ -z "${3:-}" ] || only=(--arms "$3")
           timeout 450 "${compare[@]}" scale "${only[@]}" || [ $? = 124 ] || exit 1     # 124: it ran out of time
           "${compare[@]}" scale --train false &
           bubbles=$(grep -ls "n_layer 8" out-compare/bubbles__r___2_0_*.json)    # its checkpoint is too large to bring home
           bubbles=${bubbles%.json}
           [ -n "$bubbles" ] || { wait; echo "gpu.sh: no run of bubbles is there to look at" >&2; exit 1; }
           python experiments/figures.py --figure kinds --budget 1.5,2 --out_dir "$bubbles" --results "$out" &
           python sample.py --out_dir "$bubbles" --budget 1.5 --max_new_tokens 300 --plot "$out/function.png" \
               --prompt $'\nstatic int find_free_slot(struct table *table, u32 key)\n{\n' &
           wait ;;
esac
