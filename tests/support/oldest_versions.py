"""Print the oldest versions that pyproject.toml allows, as constraints for pip: of what runs and what makes an engine.

torch is left out: on PyPI, its oldest version comes only with gigabytes of CUDA libraries.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = ("torch",)


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["compile"]]:
        requirement = Requirement(line)
        if requirement.name not in LEFT_OUT:
            (oldest,) = (one.version for one in requirement.specifier if one.operator == ">=")
            print(f"{requirement.name}=={oldest}")


if __name__ == "__main__":
    main()
