"""Some hundred cases of the fuzzer; `python -m fuzzing`, in tests/, takes any number."""

import pytest
import torch

import fastconv
from fastconv.operations import backends, normalisation
from fuzzing.arguments import draw_case, draw_tensors
from fuzzing.judgement import judge

# One case in some thousands is beyond it by no fault of ours: the order of a sum of many equal terms, say.
MOST_BEYOND = 1


def beyond_the_rule(backend, indices, interpreted=False):
    found = {}
    for index in indices:
        findings = judge(draw_case(0, index, interpreted), backend, 0, index)
        if not all(finding.excused for finding in findings):
            found[index] = list(map(str, findings))
    return found


# Parts, so that they may run side by side.
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_cases_are_right(first):
    found = beyond_the_rule("portable", range(first, first + 100))
    assert len(found) <= MOST_BEYOND, found


@pytest.mark.parametrize("first", range(0, 600, 300))
def test_random_cases_of_native_kernels_are_right(first):
    if reason := backends.can_run("native", torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    cases = {index: draw_case(0, index) for index in range(first, first + 300)}
    taken = [i for i, case in cases.items() if case.dtype == torch.float32 and case.autocast is None]
    assert len(taken) > 60
    found = beyond_the_rule("native", taken)
    assert len(found) <= MOST_BEYOND, found


@pytest.mark.interpreted
def test_random_cases_of_interpreted_kernels_are_right():
    assert beyond_the_rule("triton", range(12), interpreted=True) == {}


def test_a_case_follows_from_seed_and_index():
    torch.manual_seed(0)
    first = draw_tensors(draw_case(3, 5))
    torch.manual_seed(0)
    second = draw_tensors(draw_case(3, 5))
    assert draw_case(3, 5) == draw_case(3, 5) != draw_case(3, 6)
    assert all(a is b or torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_cases_reach_what_they_are_for():
    cases = [draw_case(0, index) for index in range(400)]
    tensors = [draw_tensors(case) for case in cases]
    maps = [given["x"] for given in tensors]
    finite = [x.float().abs().max().item() for x in maps if x.numel() > 0]
    assert {case.operation for case in cases} == set(fastconv.operations.definition.PARAMETERS)
    assert {case.computed_in for case in cases} == {torch.float32, torch.float16, torch.bfloat16}
    assert {case.autocast for case in cases} == {None, torch.float16, torch.bfloat16}
    assert any(x.numel() == 0 for x in maps)
    assert any(x.shape[2:] == (1, 1) for x in maps)
    assert max(finite) > 1e8
    assert min(filter(None, finite)) < 1e-8
    assert any(not case.asked for case in cases)


def test_a_planted_fault_is_found(monkeypatch):
    right = normalisation.mean_square
    monkeypatch.setattr(normalisation, "mean_square", lambda *arguments: right(*arguments) * 1.0001)
    assert len(beyond_the_rule("portable", range(60))) > MOST_BEYOND
