"""No property fails because a machine is slow: Hypothesis measures no time. One real run serves all report tests."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory):
    """A short real run with problems and held-out text; tests must not write into its folder."""
    from report_runs import train_short_run, write_material

    material = write_material(tmp_path_factory.mktemp("material"))
    return train_short_run(material, tmp_path_factory.mktemp("runs") / "real")
