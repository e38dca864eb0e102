"""The stand-in driver is built as NVIDIA's own nvml.h wants it: functions, structs, constants."""

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import pytest

from tests.fakes.nvml import SOURCE, build

PACKAGE = "nvidia-nvml-dev"  # setup.cfg, extra `test`
MACHINES = ("x86_64", "aarch64")  # that it is made for


@pytest.fixture(scope="module")
def include() -> Path:
    """The folder with the real nvml.h."""
    if platform.machine() not in MACHINES:
        pytest.skip(f"NVIDIA's {PACKAGE} is not made for {platform.machine()}")
    files = importlib.metadata.files(PACKAGE) or []
    return next(Path(file.locate()).parent for file in files if file.name == "nvml.h")


def declared() -> tuple[dict[str, list[str]], list[str]]:
    """What the stand-in declares for itself where the header is not used: (types and their fields, constants)."""
    text = re.search(r"#else\n(typedef struct nvmlDevice_st.*?)#define RETURN", SOURCE.read_text(), re.DOTALL)[1]
    types = {name: [] for names in re.findall(r"typedef unsigned \w+ (.*?);", text) for name in names.split(", ")}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, re.DOTALL):
        types[name] = re.findall(r"(\w+)(?:\[\w+\])?(?=[,;])", body)
    return types, re.findall(r"\bNVML_\w+", text)


def layout(folder: Path, *flags: str) -> list[str]:
    """Sizes, places of fields and values, as the compiler sees them with these flags."""
    types, constants = declared()
    told = {f"sizeof {name}": f"sizeof({name})" for name in types}
    for name, fields in types.items():
        told |= {f"{name}.{field}": f"offsetof({name}, {field})" for field in fields}
        told |= {f"sizeof {name}.{field}": f"sizeof((({name} *)0)->{field})" for field in fields}
    told |= {name: name for name in constants}
    lines = [f'printf("{name} %lld\\n", (long long)({value}));' for name, value in told.items()]
    program = folder / "layout.c"
    program.write_text(f'#include <stddef.h>\n#include "{SOURCE}"\nint main(void)\n{{\n' + "\n".join(lines) + "\n}\n")
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", *flags, "-o", folder / "layout", program], check=True)
    return subprocess.run([folder / "layout"], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("missing", [(), ("-DMISSING_V3",), ("-DMISSING_V2",)])
def test_every_function_is_as_the_header_declares_it(include: Path, tmp_path: Path, missing: tuple[str, ...]) -> None:
    # A function that the header does not have is an error; the first makes it declare the older ones as well.
    strict = ("-DNVML_NO_UNVERSIONED_FUNC_DEFS", "-Wmissing-prototypes")
    build(tmp_path, "-DUSE_NVML_H", f"-I{include}", *strict, *missing)


def test_its_own_structs_and_constants_are_the_headers(include: Path, tmp_path: Path) -> None:
    ours = layout(tmp_path)
    assert ours == layout(tmp_path, "-DUSE_NVML_H", f"-I{include}")
    assert {"sizeof nvmlProcessInfo_t 24", "nvmlProcessInfo_t.usedGpuMemory 8", "NVML_ERROR_INSUFFICIENT_SIZE 7"} <= set(ours)
