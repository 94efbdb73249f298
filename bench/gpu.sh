#!/usr/bin/env bash
# A visit to a GPU, in at most nine minutes: is everything right, how fast is it, and a whole training.
#
#     bench/gpu.sh OUT [DATA]
#     bench/gpu.sh --convnext OUT
#
# The second is a visit of its own, of as many minutes: are swapped ConvNeXts right, and how fast are the stages of
# ConvNeXt-T, and training steps of a swapped one.
# The machine needs PyTorch, Triton and pytest: no network, and nothing is installed. OUT gets at most eight files, the
# most important first, each kept if time runs out. DATA is a folder that `fastconv train --data` would take; without
# it training is on random pictures, and only its time means something. Without a GPU it rehearses on less.
set -uo pipefail

convnext=
if [ "${1:-}" = --convnext ]; then
    convnext=1
    shift
fi
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh [--convnext] OUT [DATA]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
data=${2:+$(cd "$2" && pwd)} || exit 2

# The package as an installation would lay it out.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/fastconv"
ln -s "$root"/fastconv/*.py "$package/fastconv/"
ln -s "$root/kernels" "$root/bench" "$package/fastconv/"
export PYTHONPATH="$package" PYTHONDONTWRITEBYTECODE=1
cd "$package"

failed=0

# part NAME SECONDS COMMAND...: run it within a time limit, and note how it ended.
part() {
    local name=$1 limit=$2 code=0 started=$SECONDS
    shift 2
    timeout --signal=INT --kill-after=5 "$limit" "$@" || code=$?
    echo "== $name: exit code $code after $((SECONDS - started)) s" | tee -a "$out/summary.txt"
    [ "$code" -eq 0 ] || failed=1
}

on_gpu() { python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; }

tests() {
    python -m pytest --quiet --rootdir "$root" --config-file "$root/pyproject.toml" -p no:cacheprovider "$@"
}
export -f tests
export root

: > "$out/summary.txt"
{ nvidia-smi || echo "no nvidia-smi"; } > "$out/machine.txt" 2>&1
python -m fastconv info >> "$out/machine.txt" 2>&1 || python -c "import torch; print(torch.__version__)" >> "$out/machine.txt"

if [ "$convnext" ]; then
    networks="$root/tests/test_swapped_networks.py"
    if on_gpu; then selection=(-m gpu); else selection=(-k "auto and pairs"); fi
    part swapped 200 bash -c 'tests "$@" > "$0/swapped.txt" 2>&1' "$out" "${selection[@]}" "$networks"
    part convnext 340 python -m fastconv.bench.gpu_visit convnext "$out"
    tail -n 1 "$out/swapped.txt" | tee -a "$out/summary.txt"
    exit "$failed"
fi

suite=("$root/tests/test_gpu.py" "$root/tests/test_triton.py" "$root/tests/test_stencil.py")
if on_gpu; then
    part tests 170 bash -c 'tests "$@" > "$0/tests.txt" 2>&1' "$out" -m "gpu and not slow" "${suite[@]}"
    part sanitizer 60 bash -c 'tests "$@" > "$0/sanitizer.txt" 2>&1' "$out" -m "gpu and slow" -k sanitizer "${suite[0]}"
else
    echo "rehearsal: no GPU" | tee -a "$out/summary.txt"
    part tests 170 bash -c 'tests "$@" > "$0/tests.txt" 2>&1' "$out" -k "not 2_31 and lecture" "${suite[@]}"
fi
part check 40 python -m fastconv.bench.gpu_visit check "$out"
part benchmarks 140 python -m fastconv.bench.gpu_visit benchmarks "$out"
part training 110 python -m fastconv.bench.gpu_visit training "$out" ${data:+"$data"}

tail -n 1 "$out/tests.txt" | tee -a "$out/summary.txt"
exit "$failed"
