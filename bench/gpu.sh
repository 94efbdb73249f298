#!/usr/bin/env bash
# A visit to a GPU, in three calls, each within its limit:
#
#     bench/gpu.sh [--gpu] prove OUT             165 s: is everything right?
#     bench/gpu.sh [--gpu] measure OUT           240 s: how fast is it?
#     bench/gpu.sh [--gpu] whole OUT [DATA]      255 s: training, the lecture's program, a profile, ConvNeXt-T
#
# The machine needs PyTorch, Triton and pytest: no network, and nothing is installed. OUT gets at most eight files,
# each kept as far as it came if time runs out. With --gpu it refuses to run without a GPU; otherwise, without one, it
# rehearses on less. CONTRIBUTING.md says what travels there and back.
set -uo pipefail

usage() { echo "usage: bench/gpu.sh [--gpu] prove|measure|whole OUT [DATA]" >&2; exit 2; }

gpu=
if [ "${1:-}" = --gpu ]; then
    gpu=1
    shift
fi
[ $# -ge 2 ] || usage
case $1 in
    prove) limit=165 ;;
    measure) limit=240 ;;
    whole) limit=255 ;;
    *) usage ;;
esac
stage=$1
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
data=${3:+$(cd "$3" && pwd)} || exit 2

if [ "$gpu" ] && ! python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "PyTorch finds no GPU here; without --gpu this is a rehearsal" >&2
    exit 1
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The package as an installation would lay it out.
mkdir "$scratch/fastconv"
ln -s "$root"/fastconv/* "$scratch/fastconv/"
ln -s "$root/kernels" "$root/bench" "$scratch/fastconv/"
export PYTHONPATH="$scratch" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# Caches and notes are in the scratch folder: nothing is left on the machine.
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
export FASTCONV_COMPILATIONS="$scratch/compilations"
# The stages themselves test the kernels, which are stored as in the cache that was carried.
export FASTCONV_SELFTEST=0 TRITON_STORE_BINARY_ONLY=1
# Some machines' names have no address.
export GLOO_SOCKET_IFNAME=lo
cd "$scratch"

# A stage that is interrupted packs what it compiled.
grace=15
timeout --signal=INT --kill-after="$grace" $((limit - grace)) \
    python3 -m "fastconv.bench.tools.visit.$stage" "$out" ${data:+"$data"}
