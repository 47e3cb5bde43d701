"""What `matmul-grad info` tells of the machine: how much of it the control groups of this process allow."""

from collections.abc import Callable
from pathlib import Path

import pytest

from matmul_grad import cli, machine
from matmul_grad.bench import timer

Quota = Callable[[str, dict[str, str]], None]


@pytest.fixture
def control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Quota:
    """Control groups of ``files``, and which of them this process is in."""

    def place(member: str, files: dict[str, str]) -> None:
        for name, text in {"member": member, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n", encoding="utf-8")
        monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
        monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "member")

    return place


HALF = {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("member", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/", {"unified/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 0.5),
        ("0::/unseen", {"cpu.max": "200000 100000"}, 2.0),
        ("3:cpu,cpuacct:/a", {f"cpu,cpuacct/a/{name}": text for name, text in HALF.items()}, 0.5),
        ("3:cpu,cpuacct:/unseen\n0::/", {f"cpu/{name}": text for name, text in HALF.items()}, 0.5),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpuacct:/", {f"cpuacct/{name}": text for name, text in HALF.items()}, None),
        ("", {"cpu.max": "150000 100000"}, None),
    ],
)
def test_quota_of_control_groups(
    control_groups: Quota, member: str, files: dict[str, str], quota: float | None
) -> None:
    control_groups(member, files)
    assert machine.cpu_quota() == quota


@pytest.mark.parametrize(
    ("cores", "told"),
    [
        (1.5, "2 of torch's pool, more than the 1.5 cores that the control group allows: "
              "torch.set_num_threads(1) leaves none waiting"),
        (2, "2 of torch's pool"),
    ],
)  # fmt: skip
def test_info_tells_a_quota_below_the_threads(
    control_groups: Quota, cores: float, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    control_groups("0::/", {"cpu.max": f"{int(1000 * cores)} 1000"})
    with timer.threads(2):
        assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("threads ")] == [told]
