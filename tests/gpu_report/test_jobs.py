"""The list of comparisons: all of them, each once, the important ones first, the same in every process."""

from dataclasses import asdict

from matmul_grad.bench import gpu_stats, gpu_workloads, shapes


def test_each_once_and_the_same_again() -> None:
    found = gpu_workloads.ratios()
    names = [workload.name for workload in found]
    assert len(set(names)) == len(names) > 500
    assert found == gpu_workloads.ratios()
    assert [gpu_workloads.of_row(asdict(workload)) for workload in found] == found


def test_sixteen_bits_on_every_shape_in_every_product() -> None:
    found = {
        (workload.dtype, workload.product, workload.shape)
        for workload in gpu_workloads.ratios()
        if workload.part == "products"
    }
    listed = [(n, n, n) for n in (256, 512, 1024, 2048, 4096, 8192)]
    listed += [(m, n, k) for n, k in shapes.LAYERS_NK for m in (1, 8, 128, 2048)] + [*shapes.DEEPSEEK, *shapes.ODD]
    for dtype in ("bf16", "f16"):
        assert {(dtype, product, shape) for product in gpu_workloads.PRODUCTS for shape in listed} < found


def test_a_short_run_has_seen_every_kind() -> None:
    """Every line of the summary, but those of other packages, has rows in the first third."""
    everything = gpu_workloads.ratios()
    first = [asdict(workload) for workload in everything[: len(everything) // 3]]
    for line in gpu_stats.LINES:
        if " against " not in line.name or "float32" in line.name:
            assert any(map(line.takes, first)), line.name


def test_a_step_of_float32_is_torchs_setting() -> None:
    assert {workload.precision for workload in gpu_workloads.ratios() if workload.product == "step"} == {"ieee"}


def test_others_are_compared_forward() -> None:
    found = gpu_workloads.against_others()
    assert (
        {workload.part for workload in found} == set(gpu_workloads.OTHER_PACKAGES) == set(gpu_stats.gpu_backends.OTHERS)
    )
    assert {workload.product for workload in found} == {"forward"}
