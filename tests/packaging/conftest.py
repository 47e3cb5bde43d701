"""What the tests of wheels share."""

import pytest
from wheels import Built, build, copy_checkout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    copy = copy_checkout(folder / "copy")
    build(copy, folder / "direct", "--wheel")
    build(copy, folder / "sdist")
    (direct,), (sdist,) = ((folder / name).glob("*.whl") for name in ("direct", "sdist"))
    return Built(copy, direct, sdist)
