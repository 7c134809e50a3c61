"""Any spec is read, or refused in words within a second: whatever stands in whichever of its fields."""

import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lossworks.errors import UserError
from lossworks.specs.base import field_paths, read_yaml
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_class, task_slugs
from lossworks_federated.specs import FederationSpec
from lossworks_tune.studies.spec import StudySpec
from lossworks_tune.sweeps.spec import SweepSpec

CLASSIFIER = {"task": "classification"}
BASES = {
    **{slug: {"kind": "training", "task": slug} for slug in task_slugs()},
    "federation": {"kind": "federation"},
    "sweep": {"kind": "sweep", "base": CLASSIFIER, "losses": ["ldr"]},
    "study": {"kind": "study", "base": CLASSIFIER, "compare": ["ldr", "cross-entropy"]},
}
CLASSES = {"federation": FederationSpec, "sweep": SweepSpec, "study": StudySpec}
WORDS = st.sampled_from(
    ["", "ldr", "csv:x", "text:", "hf:", "blobs:20", "chain:99", "asha", "fsdp", "start", "é\x07", "1:30"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**12),
    st.floats(allow_nan=True, allow_infinity=True),
    WORDS,
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "weight", "kind", "log", "ema", "x"]), inner, max_size=3),
    ),
    max_leaves=4,
)


def read(kind, values):
    if kind in CLASSES:
        return CLASSES[kind].parse(values)
    return parse_train_spec(values)


def set_field(values, path, value):
    *parents, leaf = path.split(".")
    for name in parents:
        below = values.get(name)
        values[name] = dict(below) if isinstance(below, dict) else {}
        values = values[name]
    values[leaf] = value


def require_words(kind, data, folder):
    model = CLASSES[kind] if kind in CLASSES else task_class(kind).spec
    paths = sorted(field_paths(model))
    values = {name: dict(of) if isinstance(of, dict) else of for name, of in BASES[kind].items()}
    for _ in range(data.draw(st.integers(1, 3))):
        set_field(values, data.draw(st.sampled_from(paths)), data.draw(VALUES))
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="replace")
    began = time.perf_counter()
    refusal = "refused"
    try:
        spec = read(kind, read_yaml(file))
    except UserError as error:
        refusal = str(error)
    else:
        assert read(kind, spec.model_dump(mode="json")) == spec
    assert time.perf_counter() - began < 1
    assert 0 < len(refusal) < 5000


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """What is imported or read once is not what is timed."""
    for kind, values in BASES.items():
        read(kind, values)


KINDS = pytest.mark.parametrize("kind", sorted(BASES))
ONE_FOLDER = [HealthCheck.function_scoped_fixture]


@KINDS
@settings(max_examples=25, suppress_health_check=ONE_FOLDER)
@given(data=st.data())
def test_any_spec_is_read_or_refused_in_words(kind, data, tmp_path):
    require_words(kind, data, tmp_path)


@pytest.mark.slow
@KINDS
@settings(max_examples=250, suppress_health_check=ONE_FOLDER, derandomize=False)
@given(data=st.data())
def test_two_thousand_specs_are_read_or_refused_in_words(kind, data, tmp_path):
    require_words(kind, data, tmp_path)
