"""What verdicts do on a GPU, with the harness in its place: the trials, the paths, a session."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import json

import mlx.core as mx
import pytest
import typer
from typer.testing import CliRunner

from mlx_sleep.cli import doctor
from mlx_sleep.kernels import chunks
from mlx_sleep.models.calibrate import calibrate, shapes_of
from mlx_sleep.models.load import EMBEDDED, load_model
from mlx_sleep.ops import calibration, gated_delta, paths, verdicts
from mlx_sleep.ops.paths import VARIABLE, candidates
from mlx_sleep.ops.verdicts import Result, Shape, Verdict
from mlx_sleep.session import Session
from tests.fakes import fake_model, fake_tokenizer
from tests.ops_reference import arrays, assert_close, assert_gradients, draw, reference

from . import harness

assert mlx_sleep  # imported for its effect
HEADS = (1, 2, 32, 32)
PROMPT = Shape("gated_delta", "prompt", HEADS, (mx.float32,) * 6)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A GPU for `paths`, no verdicts yet."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(paths, "_on_metal", lambda: True)
    monkeypatch.setattr(verdicts, "verdicts_file", lambda: tmp_path / "verdicts.json")
    verdicts.verdicts.cache_clear()
    with paths.recording():
        yield verdicts.verdicts()
    verdicts.verdicts.cache_clear()


@pytest.fixture
def judged(monkeypatch):
    """Judging that takes the last candidate and measures nothing: the shapes it was asked for."""
    shapes = []

    def trial_of(shape):
        shapes.append(shape)
        return shape

    monkeypatch.setattr(calibration, "trial_of", trial_of)
    monkeypatch.setattr(
        calibration,
        "judge",
        lambda shape: Verdict(candidates(shape)[-1], {candidates(shape)[-1]: Result(0.0, 1.0)}),
    )
    return shapes


CASES = [
    ("gated_delta", HEADS, 6, ("token", "prompt", "gradient")),
    ("ssd", HEADS, 6, ("token", "prompt", "gradient")),
    ("ssd", HEADS, 7, ("prompt", "gradient")),
    ("short_conv", (24, 4), 3, ("token", "prompt", "gradient")),
    ("dynamic_conv", (24, 3), 3, ("token", "prompt", "gradient")),
    ("gated_delta_net", (*HEADS, 4), 9, ("token",)),
    ("mamba2", (*HEADS, 4), 9, ("token",)),
    ("delta_attention", (2, 2, 32, 32, 4), 11, ("token",)),
]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    ("op", "use", "sizes", "count"), [(o, u, s, n) for o, s, n, uses in CASES for u in uses]
)
def test_every_candidate_is_proved(monkeypatch, kept, op, use, sizes, count, dtype):
    """Ours, too: the harness runs the kernels, and each is told from arrays by its launches."""
    shape = Shape(op, use, sizes, (dtype,) * count)
    times = {"metal": 1.0, candidates(shape)[-1]: 2.0}
    trial = calibration.trial_of(shape)
    launched = {}
    for path, form in trial.forms.items():
        with harness.launches() as launches:
            result = verdicts._prove(form, trial)
        launched[path] = len(launches)
        assert not result.barred and result.error <= trial.tolerance
    assert launched.keys() == times.keys()
    if not mx.metal.is_available():
        assert launched["metal"] > 0 == launched[candidates(shape)[-1]]
    # As a whole, with the clock's part made up.
    monkeypatch.setattr(verdicts, "_time", lambda form, trial, clock: next(order))
    order = iter([1.0, 2.0] * verdicts.REPEATS)
    calibration.calibrate({shape})
    assert kept.get(shape).taken == "metal"


@pytest.mark.parametrize("use", ["prompt", "gradient"])
def test_timed_runs_go_on_from_the_state_before(kept, use):
    shape = PROMPT._replace(use=use)
    trial = calibration.trial_of(shape)
    results = trial.forms["chunk"](trial.timed)
    fed, _ = trial.feed(trial.timed, results)
    changed = [i for i, (a, b) in enumerate(zip(fed, trial.timed[0], strict=True)) if a is not b]
    assert changed == ([5] if use == "prompt" else [7])
    assert mx.array_equal(fed[changed[0]], results[1 if use == "prompt" else 5])


def test_a_kernel_that_cannot_be_built_is_barred(monkeypatch, kept):
    def kernel(file, name):
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    monkeypatch.setattr(chunks, "kernel", kernel)
    calibration.calibrate({PROMPT})
    verdict = kept.get(PROMPT)
    assert verdict.taken == "chunk" and not verdict.results["chunk"].barred
    assert "Unable to build" in verdict.results["metal"].barred


@pytest.mark.kernels
def test_a_call_takes_arrays_before_its_verdict_and_the_kernel_after(kept, rng):
    inputs = draw(rng, B=1, T=9, Hk=1, Hv=2, Dk=32, Dv=32)

    def launched():
        with harness.launches() as launches:
            got = gated_delta.gated_delta(*arrays(inputs))
            assert_close(got, reference("gated_delta", *inputs), 1e-6)
        return bool(launches)

    if mx.metal.is_available():
        pytest.skip("counts the harness's launches")
    assert not launched() and paths.unjudged() == {PROMPT}
    kept.put(PROMPT, Verdict("metal"))
    assert launched() and not paths.unjudged()
    kept.put(PROMPT, Verdict("warp"))  # a candidate of another version
    assert not launched()


@pytest.mark.kernels
@pytest.mark.parametrize("forward", ["metal", "chunk", None])
@pytest.mark.parametrize("backward", ["metal", "chunk", None])
def test_the_gradient_has_a_verdict_of_its_own(kept, rng, forward, backward):
    """Any pair of paths gives the gradient; our backward kernel runs only where judged."""
    for use, taken in (("prompt", forward), ("gradient", backward)):
        if taken:
            kept.put(PROMPT._replace(use=use), Verdict(taken))
    inputs = draw(rng, B=1, T=9, Hk=1, Hv=2, Dk=32, Dv=32)
    with harness.launches() as launches:
        op = gated_delta.gated_delta
        assert_gradients("gated_delta", op, rng, inputs, mx.float32, 1e-5, tries=1)
    if not mx.metal.is_available():
        used = any("backward" in launch.name for launch in launches)
        assert used == (backward == "metal")


def test_a_process_that_dies_while_judging_does_not_try_again(monkeypatch, kept, tmp_path):
    def judge(trial):
        found = json.loads((tmp_path / "verdicts.json").read_text())
        assert found[kept.machine][str(PROMPT)] == {"taken": "chunk", "results": {}}
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate({PROMPT})
    assert kept.get(PROMPT) is None  # Ctrl-C is no crash
    kept.put(PROMPT, Verdict("chunk"))  # what a crash leaves
    calibration.calibrate({PROMPT})
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate({PROMPT}, again=True)


def test_a_trial_that_cannot_be_made_costs_no_conversation(monkeypatch, kept):
    def trial_of(shape):
        raise MemoryError("no room")

    monkeypatch.setattr(calibration, "trial_of", trial_of)
    calibration.calibrate({PROMPT})
    assert kept.get(PROMPT) == Verdict(
        "chunk", dict.fromkeys(("metal", "chunk"), Result(barred="no room"))
    )


def test_it_stops_between_two_shapes(kept, judged):
    answers = iter([False, True])
    calibration.calibrate(
        {PROMPT, PROMPT._replace(use="token"), PROMPT._replace(op="ssd")}, lambda: next(answers)
    )
    assert len(judged) == 1


# --- models --------------------------------------------------------------------------------


def test_the_shapes_of_a_model(kept):
    model, _ = load_model(EMBEDDED)
    found = {(s.op, s.use) for s in shapes_of(model, gradients=True)}
    ops = {
        (op, use) for op in ("gated_delta", "short_conv") for use in ("token", "prompt", "gradient")
    }
    assert found == ops | {("gated_delta_net", "token")}
    assert all(s.dtypes for s in shapes_of(model)) and not paths.unjudged()


def test_ops_are_judged_before_the_mixers_made_of_them(kept, judged):
    model, _ = load_model(EMBEDDED)
    calibrate(model)
    assert [s.op for s in judged].index("gated_delta_net") == len(judged) - 1
    calibrate(model)
    assert len(judged) == len(set(judged))


def test_a_session_judges_when_nobody_waits(kept, judged):
    session = Session(fake_model(), fake_tokenizer(), max_tokens=3)
    before = list(judged)
    assert before and {s.use for s in before} == {"token", "prompt"}
    met = PROMPT._replace(sizes=(3, 3, 40, 40))
    pieces = session.say("hello")
    paths.path(met)
    list(pieces)
    assert judged == before
    session.sleep()
    assert judged == [*before, met]
    session.close()


def test_nothing_happens_without_a_gpu(monkeypatch, kept, judged, tmp_path):
    monkeypatch.setattr(paths, "_on_metal", lambda: False)
    calibrate(fake_model(), gradients=True)
    assert not judged and not list(tmp_path.iterdir())


@pytest.mark.parametrize("wish", ["metal", "array"])
def test_nothing_happens_where_the_variable_decides(monkeypatch, kept, judged, wish, tmp_path):
    kept.put(PROMPT, Verdict("metal" if wish == "array" else "chunk"))
    monkeypatch.setenv(VARIABLE, wish)
    calibrate(fake_model())
    assert not judged
    assert paths.path(PROMPT) == ("metal" if wish == "metal" else "chunk")


# --- doctor --------------------------------------------------------------------------------


def run_doctor(*arguments: str):
    app = typer.Typer()
    app.command()(doctor.doctor)
    return CliRunner().invoke(app, arguments)


def test_doctor_shows_verdicts(kept):
    kept.put(
        PROMPT,
        Verdict("metal", {"metal": Result(2e-7, 4.12e-4), "chunk": Result(0.3, barred="wrong")}),
    )
    kept.put(PROMPT._replace(use="token"), Verdict("step"))
    shown = run_doctor().stdout
    assert "gated_delta prompt 1x2x32x32 float32: metal\n" in shown
    assert "metal: 0.412 ms, error 2e-07" in shown and "chunk: wrong (error 3e-01)" in shown
    assert "measuring it never ended" in shown
    assert set(json.loads(run_doctor("--json").stdout)["verdicts"]) == set(kept.all())


def test_doctor_calibrates_a_model_again(kept, judged):
    for _ in range(2):
        result = run_doctor("--calibrate", "--model", str(EMBEDDED))
        assert result.exit_code == 0 and f"calibrated  for {EMBEDDED}" in result.stdout
    assert len(judged) == 2 * len(set(judged)) and "gradient" in {s.use for s in judged}


def test_doctor_calibrates_the_blas_without_a_gpu(monkeypatch, kept, judged):
    monkeypatch.setattr(paths, "_on_metal", lambda: False)
    monkeypatch.setattr(doctor.doctor_blas, "calibrate", lambda: "the BLAS")
    result = run_doctor("--calibrate")
    assert result.exit_code == 0 and "calibrated  the BLAS" in result.stdout and not judged
    assert run_doctor("--calibrate", "--model", str(EMBEDDED)).exit_code == 1
    monkeypatch.setenv(VARIABLE, "array")
    assert f"{VARIABLE} decides" in run_doctor("--calibrate").stdout
    assert run_doctor("--model", "x").exit_code == 1
