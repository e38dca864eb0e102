"""What is wrong with a configuration, in one sentence that an operator can act on."""

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """`file` is relative to LLMWD_HOME where it lies in it ("environment" for a process variable), `line` counts from 1."""

    file: str
    line: int | None
    variable: str | None
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line is not None else self.file
        return ": ".join(part for part in (place, self.variable, self.message) if part)


class ConfigError(ValueError):
    """A request about the configuration that is refused; the text is one sentence for the operator."""
