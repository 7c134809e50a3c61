"""A deployed federation on loopback: credentials, refusals, and the same model as the cohort engine's."""

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from lossworks.tensors import load_tensors
from lossworks_federated.engines.credentials import make_certificates, make_node_key
from lossworks_federated.federate import federate
from lossworks_federated.loopback import Deployment, main
from lossworks_testing.federation import difference, tiny


def test_certificates_are_for_loopback_and_keys_for_their_owner(tmp_path: Path) -> None:
    authority, certificate, key = make_certificates(tmp_path)
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    found.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.read_bytes()))
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    context = ssl.create_default_context(cafile=authority)
    context.load_cert_chain(certificate, key)
    private, public = make_node_key(tmp_path, "node-0")
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    for secret in (key, private):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert len(list(tmp_path.iterdir())) == 5  # the authority's own key is not kept


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["split.clients=11"], "10 are the most"),
        (["split.clients=3", "strategies=[fedavg]", "privacy=local"], "brings its own mods"),
        (["split.clinets=3"], "did you mean"),
    ],
)
def test_what_can_not_be_deployed_is_refused(
    overrides: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["federated/specs/digits.yaml", *overrides]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("")
    spec = ["federated/specs/digits.yaml", "split.clients=2"]
    assert main([*spec, "--folder", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_deployment_gives_the_cohort_engines_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    split = {"kind": "dirichlet", "clients": 2, "alpha": 0.5}
    spec = tiny("scaffold", rounds=2, split=split)
    ours = federate(spec).folder.path
    with Deployment(tmp_path / "deployed") as deployment:
        deployment.add_node(2, 2, registered=False)
        for partition in range(2):
            deployment.add_node(partition, 2)
        theirs = deployment.run(spec)
        refused = ["Connection attempt failed" in deployment.log(f"node-{number}") for number in range(3)]
    assert refused == [False, False, True]
    first, second = (next(path.glob("*/model.safetensors")) for path in (ours, theirs))
    assert difference(load_tensors(first), load_tensors(second)) < 1e-5
