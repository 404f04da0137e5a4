"""A rig survives its file, a wrong field is refused by name, and the drive's laws are those of the byte table."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.scheduler.rig import ComputeSpeed, CoreSpeed, DriveSpeed, LinkSpeed, Rig, TierSizes

TEXT = """
name = "a box"

[drive]
read_gb_s = 6.9
write_gb_s = 5.0
law = "duplex"
latency_s = 1e-4
depth = 8

[link]
h2d_gb_s = 25
d2h_gb_s = 24.5

[cores]
count = 16
update_elements_s = 2e8
dram_gb_s = 60

[compute]
flop_s = 1.5e14

[sizes]
device = "24GiB"
host = "64GB"
nvme = 2000000000000
"""


def test_a_file_gives_every_field_with_sizes_in_bytes() -> None:
    rig = Rig.from_toml(TEXT)
    assert rig.drive == DriveSpeed(read_gb_s=6.9, write_gb_s=5.0, law="duplex", latency_s=1e-4, depth=8)
    assert rig.link == LinkSpeed(h2d_gb_s=25, d2h_gb_s=24.5)
    assert rig.cores == CoreSpeed(count=16, update_elements_s=2e8, dram_gb_s=60)
    assert rig.compute.flop_s == 1.5e14
    assert rig.sizes == TierSizes(device=24 << 30, host=64 * 10**9, nvme=2 * 10**12)
    assert not rig.one_memory


speeds = st.floats(min_value=1e-3, max_value=1e15) | st.just(math.inf)
drives = st.builds(
    DriveSpeed, read_gb_s=speeds, write_gb_s=speeds, law=st.sampled_from(("duplex", "additive")),
    latency_s=st.floats(min_value=0, max_value=1), depth=st.integers(1, 1024),
) | st.builds(
    DriveSpeed, read_gb_s=speeds, write_gb_s=speeds, law=st.just("mixed"), mixed_gb_s=speeds, latency_s=st.just(0.0),
    depth=st.just(1),
)  # fmt: skip
links = st.builds(LinkSpeed, h2d_gb_s=speeds, d2h_gb_s=speeds)


@given(
    name=st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0xFFFF), min_size=1),
    drive=st.none() | drives,
    link=st.none() | links,
    cores=st.builds(CoreSpeed, count=st.integers(1, 512), update_elements_s=speeds, dram_gb_s=speeds),
    flop_s=speeds,
    nbytes=st.integers(1, 1 << 50),
)
def test_what_is_written_is_read_back_equal(
    name: str, drive: DriveSpeed | None, link: LinkSpeed | None, cores: CoreSpeed, flop_s: float, nbytes: int
) -> None:
    rig = Rig(
        name=name,
        drive=drive,
        link=link,
        cores=cores,
        compute=ComputeSpeed(flop_s=flop_s),
        sizes=TierSizes(host=nbytes, device=nbytes if link else 0, nvme=nbytes if drive else 0),
    )
    assert Rig.from_toml(rig.to_toml()) == rig


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("depth = 8", "depth = 8\nspeed = 3", r"box.toml: drive.speed is not a field"),
        ("read_gb_s = 6.9\n", "", r"box.toml: drive.read_gb_s is missing"),
        ("read_gb_s = 6.9", "read_gb_s = -6.9", r"drive.read_gb_s is -6.9; expected a number above zero"),
        ("read_gb_s = 6.9", "read_gb_s = 0", r"drive.read_gb_s is 0; expected a number above zero"),
        ("read_gb_s = 6.9", "read_gb_s = nan", r"drive.read_gb_s is nan"),
        ("latency_s = 1e-4", "latency_s = -1", r"drive.latency_s is -1; expected a number of at least zero"),
        ("depth = 8", "depth = 0", r"drive.depth is 0; expected a whole number"),
        ("depth = 8", "depth = true", r"drive.depth is True"),
        ('law = "duplex"', 'law = "fast"', r"drive.law is 'fast'; expected one of duplex, additive, mixed"),
        ('law = "duplex"', 'law = "mixed"', r"drive.mixed_gb_s is None with the law 'mixed'"),
        ('law = "duplex"', 'law = "duplex"\nmixed_gb_s = 3', r"drive.mixed_gb_s is 3 with the law 'duplex'"),
        ("h2d_gb_s = 25", 'h2d_gb_s = "25"', r"link.h2d_gb_s is '25'"),
        ("count = 16", "count = 1.5", r"cores.count is 1.5; expected a whole number"),
        ("flop_s = 1.5e14", "flop_s = 0.0", r"compute.flop_s is 0.0"),
        ('device = "24GiB"', 'device = "24 gigs"', r"sizes.device is '24 gigs'"),
        ('device = "24GiB"', "device = -1", r"sizes.device is -1"),
        ('host = "64GB"', "host = 0", r"sizes.host is 0"),
        ('host = "64GB"\n', "", r"sizes.host is missing"),
        ('device = "24GiB"\n', "", r"sizes.device is 0 and the section \[link\] is present"),
        ("nvme = 2000000000000", "nvme = 0", r"sizes.nvme is 0 and the section \[drive\] is present"),
        ('name = "a box"', 'name = ""', r"name is ''"),
        ('name = "a box"', 'name = "a box"\ncolour = "red"', r"box.toml: colour is not a field"),
        ('name = "a box"', 'name = "a box"\ndrive = 3', r"box.toml: "),
        ('name = "a box"\n', "", r"box.toml: name is missing"),
    ],
)
def test_a_wrong_field_is_refused_with_file_and_key(old: str, new: str, named: str) -> None:
    assert old in TEXT
    with pytest.raises(ValueError, match=named):
        Rig.from_toml(TEXT.replace(old, new), "box.toml")


def test_the_three_laws() -> None:
    duplex = DriveSpeed(read_gb_s=4, write_gb_s=2, law="duplex", latency_s=0.0, depth=1)
    additive = dataclasses.replace(duplex, law="additive")
    mixed = dataclasses.replace(duplex, law="mixed", mixed_gb_s=2.5)
    assert duplex.service_s(8e9, 2e9) == 2.0
    assert duplex.service_s(2e9, 8e9) == 4.0
    assert additive.service_s(8e9, 2e9) == 3.0
    assert mixed.service_s(8e9, 2e9) == 4.0


def test_without_a_drive_only_zero_bytes_can_be_served() -> None:
    rig = dataclasses.replace(Rig.from_toml(TEXT), drive=None, sizes=TierSizes(host=1, device=1))
    assert rig.service_s(0, 0) == 0.0
    with pytest.raises(ValueError, match="no drive"):
        rig.service_s(1, 0)
