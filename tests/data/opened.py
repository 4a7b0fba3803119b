"""Datasets of plain gray images, opened."""

from ddpm.config.data import DataConfig
from ddpm.data import decode
from ddpm.data.source import Source, open_source

VALUES = (10, 20, 30)


def value_of(row: dict, hub_id: str | None = None) -> int:
    """The gray value of an undecoded row of `gray` images."""
    config = decode.DecodeConfig.of(DataConfig(resolution=4))
    return int(decode.decode_row(row, config, hub_id)[0][0, 0, 0])


def opened(streaming: bool = False, **settings) -> tuple[Source, list[int]]:
    """A source, and the gray values of its rows in order."""
    source = open_source(DataConfig(streaming=streaming, **settings))
    return source, [value_of(row[source.column], source.hub_id) for row in source.dataset]
