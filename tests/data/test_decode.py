"""Decoding one file: every mode against values computed by hand, geometry, limits."""

import io
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from ddpm.config.data import DataConfig
from ddpm.data import decode
from ddpm.errors import UsageError
from tests.files import chunk, encoded, gray, header, noise, photo, png, tiff

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
PILLOW_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 12 does not read such a TIFF"
)


def decode_config(**settings) -> decode.DecodeConfig:
    return decode.DecodeConfig.of(DataConfig(**{"resolution": 4, **settings}))


def decoded(file: bytes, background=WHITE, value_range=None) -> list:
    """The pixels that a file becomes, as nested lists."""
    image, _ = decode.decode_image(io.BytesIO(file), background, value_range)
    assert image.mode in ("L", "RGB")
    return np.asarray(image).tolist()


def info_of(file: bytes) -> decode.ImageInfo:
    return decode.decode_image(io.BytesIO(file), WHITE)[1]


def read(file: bytes | None, **settings) -> np.ndarray:
    value = None if file is None else {"bytes": file, "path": None}
    return decode.decode_row(value, decode_config(**settings), None)[0]


def mode_of(file: bytes) -> str:
    return Image.open(io.BytesIO(file)).mode


def mixed(color: int, background: int, alpha: float) -> int:
    """Alpha compositing of one channel, by hand."""
    return round(color * alpha + background * (1 - alpha))


# Every mode


def test_gray_and_rgb_are_unchanged():
    values = [[0, 7], [128, 255]]
    assert decoded(encoded(np.array(values, np.uint8))) == values
    colors = (np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20).tolist()
    assert decoded(encoded(np.array(colors, np.uint8))) == colors


def test_one_bit_is_black_and_white():
    file = encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    assert mode_of(file) == "1"
    assert decoded(file) == [[0, 255]]
    assert info_of(file).bits == 1


@pytest.mark.parametrize("background", [WHITE, BLACK, (255, 0, 0)])
def test_transparent_pixels_show_the_background(background):
    """Opaque, a fifth, and fully transparent: color x alpha + background x (1 - alpha)."""
    rgba = np.array([[[10, 20, 30, 255], [100, 100, 100, 51], [77, 77, 77, 0]]], np.uint8)
    opaque, fifth, none = decoded(encoded(rgba), background)[0]
    assert opaque == [10, 20, 30]
    assert fifth == [mixed(100, part, 0.2) for part in background]
    assert none == list(background)


def test_gray_with_alpha_shows_the_background():
    file = encoded(Image.fromarray(np.array([[[60, 255], [60, 0]]], np.uint8), "LA"))
    assert mode_of(file) == "LA"
    assert decoded(file) == [[[60] * 3, [255] * 3]]
    assert decoded(file, (1, 2, 3)) == [[[60] * 3, [1, 2, 3]]]
    assert read(file).shape == (1, 4, 8)  # but trained as gray


def test_palette_and_its_transparent_entry():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    plain = encoded(image)
    assert mode_of(plain) == "P"
    assert decoded(plain) == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert decoded(encoded(image, transparency=1), (9, 8, 7)) == [
        [[255, 0, 0], [9, 8, 7], [0, 0, 255]]
    ]
    half = encoded(image, transparency=bytes([255, 51, 0]))  # an alpha for each entry
    assert decoded(half, BLACK) == [[[255, 0, 0], [0, 51, 0], [0, 0, 0]]]


def test_palette_of_gray_colors_is_gray():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 99, 99, 99])
    assert read(encoded(image)).tolist() == [[[99] * 4] * 4]


def test_transparent_gif_shows_the_background():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert decoded(encoded(image, kind="GIF", transparency=1), (0, 9, 0)) == [
        [[255, 0, 0], [0, 9, 0]]
    ]


def test_transparent_color_of_a_png_shows_the_background():
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decoded(encoded(rgb, transparency=(4, 5, 6)), (0, 9, 0)) == [[[1, 2, 3], [0, 9, 0]]]
    assert decoded(png([[9, 200]], 0, bits=8, transparent=(200,)), BLACK) == [[[9] * 3, [0] * 3]]


@pytest.mark.parametrize(
    ("bits", "packed", "values"),
    [(1, 0b01000000, [0, 255]), (2, 0b00110000, [0, 255]), (4, 0x0F, [0, 255])],
)
def test_transparent_gray_of_few_bits_is_in_units_of_the_file(bits, packed, values):
    """Black, then white, which in the file is 1, 3 or 15, is transparent."""
    top = 2**bits - 1
    body = chunk(b"IDAT", zlib.compress(bytes([0, packed]))) + chunk(b"IEND", b"")
    plain = header(2, 1, bits) + body
    keyed = header(2, 1, bits) + chunk(b"tRNS", top.to_bytes(2, "big")) + body
    assert decoded(plain) == [values]
    assert decoded(keyed, (9, 8, 7)) == [[[0, 0, 0], [9, 8, 7]]]


def test_cmyk_is_converted_to_rgb():
    inks = np.array([[[0, 0, 0, 0], [255, 255, 0, 0], [0, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)
    file = encoded(Image.fromarray(inks, "CMYK"), kind="TIFF")
    assert decoded(file) == [[[255] * 3, [0, 0, 255], [0] * 3, [204] * 3]]


def test_inverted_cmyk_of_a_jpeg_is_converted_to_rgb():
    """Adobe's JPEGs hold 255 - ink, and an APP14 mark that says so; Pillow writes the same."""
    file = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind="JPEG", quality=100)
    assert b"Adobe" in file[:200]
    assert mode_of(file) == "CMYK"
    pixels = np.array(decoded(file))
    assert np.abs(pixels - [255, 0, 0]).max() <= 2


@PILLOW_13
def test_ycbcr_is_converted_to_rgb():
    """R = Y + 1.402 (Cr - 128), B = Y + 1.772 (Cb - 128), as JFIF says."""
    image = Image.fromarray(np.full((8, 8, 3), (100, 128, 178), np.uint8), "YCbCr")
    file = encoded(image, kind="TIFF")
    assert mode_of(file) == "YCbCr"
    red, green, blue = decoded(file)[0][0]
    assert abs(red - (100 + 1.402 * 50)) <= 1
    assert abs(green - (100 - 0.714 * 50)) <= 1
    assert blue == 100


def test_sixteen_bit_gray_is_scaled_by_its_range():
    file = encoded(np.array([[0, 200, 257, 32768, 65535]], np.uint16))
    assert mode_of(file) == "I;16"
    assert decoded(file) == [[0, 1, 1, 128, 255]]  # v / 257, to the nearest
    info = info_of(file)
    assert (info.bits, info.low, info.high) == (16, 0, 65535)


@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
def test_sixteen_bits_of_other_formats(kind):
    file = encoded(np.array([[0, 200, 65535]], np.uint16), kind=kind)
    assert decoded(file) == [[0, 1, 255]]
    assert info_of(file).high == 65535


def test_sixteen_bit_gray_with_a_transparent_value():
    """The key is compared in sixteen bits: 200 is transparent, 257, which is 1 too, is not."""
    file = png([[0, 200, 257]], 0, transparent=(200,))
    assert mode_of(file) == "I;16"
    assert decoded(file, (9, 8, 7)) == [[[0] * 3, [9, 8, 7], [1] * 3]]


def test_sixteen_bit_color_is_rounded():
    file = png([[[0, 200, 65535], [300, 32768, 40000]]], 2)
    assert mode_of(file) == "RGB"
    assert decoded(file) == [[[0, 1, 255], [1, 128, round(40000 / 257)]]]
    assert info_of(file).bits == 16


def test_sixteen_bit_color_with_a_transparent_color():
    file = png([[[300, 300, 40000], [301, 300, 40000]]], 2, transparent=(300, 300, 40000))
    assert decoded(file, (9, 8, 7)) == [[[9, 8, 7], [1, 1, 156]]]


def test_sixteen_bit_color_with_alpha():
    alpha = 13107  # a fifth of 65535
    file = png([[[65535, 0, 25700, 65535], [25700, 25700, 25700, alpha], [9, 9, 9, 0]]], 6)
    assert mode_of(file) == "RGBA"
    expected = [[255, 0, 100], [mixed(100, part, 0.2) for part in (9, 99, 255)], [9, 99, 255]]
    assert decoded(file, (9, 99, 255)) == [expected]


def test_sixteen_bit_gray_with_alpha_is_gray():
    file = png([[[25700, 65535], [25700, 13107], [25700, 0]]], 4)
    assert decoded(file) == [[[100] * 3, [mixed(100, 255, 0.2)] * 3, [255] * 3]]
    assert read(file).shape[0] == 1


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("big_endian", [False, True])
def test_sixteen_bit_color_of_a_tiff_is_rounded_and_scaled(big_endian, planar):
    """Of a satellite's 12 bits, Pillow alone keeps the upper four."""
    colors = np.random.default_rng(0).integers(0, 4096, (3, 5, 3)).astype(np.uint16)
    file = tiff(colors, photometric=2, big_endian=big_endian, planar=planar)
    assert decoded(file) == np.rint(colors / 257).tolist()
    assert decoded(file, value_range=(0, 4095)) == np.rint(colors / 4095 * 255).tolist()
    info = info_of(file)
    assert (info.bits, info.low, info.high) == (16, colors.min(), colors.max())


def test_sixteen_bit_color_of_a_tiff_with_more_bands():
    bands = np.random.default_rng(0).integers(0, 65536, (3, 5, 4)).astype(np.uint16)
    infrared = tiff(bands, photometric=2, extra=(0,))
    assert decoded(infrared) == np.rint(bands[:, :, :3] / 257).tolist()
    assert info_of(infrared).extra_bands
    bands[:, :, 3] = 65535
    alpha = tiff(bands, photometric=2, extra=(2,))
    assert decoded(alpha) == np.rint(bands[:, :, :3] / 257).tolist()
    assert not info_of(alpha).extra_bands
    premultiplied = tiff(bands, photometric=2, extra=(1,))
    assert decoded(premultiplied) == (bands[:, :, :3] >> 8).tolist()


@pytest.mark.parametrize(
    "bands, photometric", [pytest.param(2, 1, marks=PILLOW_13), (4, 2), (5, 2)]
)
def test_bands_that_are_not_used_are_reported(bands, photometric):
    values = noise(3, 5, bands)
    extra = (0,) * (bands - (3 if photometric == 2 else 1))
    info = info_of(tiff(values, photometric, extra))
    assert info.extra_bands and not info.alpha
    assert (
        decoded(tiff(values, photometric, extra))
        == np.squeeze(values[:, :, : 3 if photometric == 2 else 1]).tolist()
    )


@pytest.mark.parametrize(
    "values, photometric, reason",
    [
        (np.zeros((4, 4, 13), np.uint16), 1, "TIFF with 13 bands of 16-bit unsigned integers"),
        (np.zeros((4, 4, 3), np.float32), 2, "TIFF with 3 bands of 32-bit floats"),
        (np.zeros((4, 4, 1), np.int64), 1, "TIFF with 1 band of 64-bit signed integers"),
    ],
)
def test_bands_that_are_no_image_are_counted(values, photometric, reason):
    with pytest.raises(decode.DecodeError, match=f"not a readable image: {reason}, to be conv"):
        read(tiff(values, photometric))


@pytest.mark.parametrize("value", [-9999, np.nan])
def test_value_for_no_data_is_named(value):
    values = np.array([[[0.5]], [[value]]], np.float32)
    named = rf"; {value:g} stands for no data: fill it first \(docs/data.md\)"
    with pytest.raises(decode.DecodeError, match=named):
        read(tiff(values, no_data=f"{value:g}\0".encode()))
    with pytest.raises(decode.DecodeError, match="expected 0 to 1|not finite") as error:
        read(tiff(values))
    assert "no data" not in str(error.value)


def test_sixteen_bit_interlaced_png_is_equal():
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, 3))
    assert decoded(png(values, 2, interlaced=True)) == decoded(png(values, 2))
    assert decoded(png(values, 2)) == np.rint(values / 257).astype(int).tolist()


def test_32_bit_integers_are_scaled_as_16_bit_ones():
    file = encoded(np.array([[0, 65535]], np.int32), kind="TIFF")
    assert mode_of(file) == "I"
    assert decoded(file) == [[0, 255]]


def test_floats_run_from_0_to_1():
    file = encoded(np.array([[0.0, 0.5, 1.0]], np.float32), kind="TIFF")
    assert mode_of(file) == "F"
    assert decoded(file) == [[0, 128, 255]]
    assert (info_of(file).low, info_of(file).high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "limits", "expected"),
    [
        (np.array([[0, 819, 4095]], np.uint16), (0, 4095), [0, 51, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), (-1, 1), [0, 128, 255]),
        (np.array([[-1000, 400]], np.int32), (-1000, 400), [0, 255]),
    ],
)
def test_value_range_is_scaled_from_black_to_white(values, limits, expected):
    assert decoded(encoded(values, kind="TIFF"), value_range=limits) == [expected]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[-0.5, 1.0]], np.float32), "values from -0.5 to 1, expected 0 to 1"),
        (np.array([[0.0, 255.0]], np.float32), "values from 0 to 255, expected 0 to 1"),
        (np.array([[-1, 0]], np.int32), "values from -1 to 0, expected 0 to 65535"),
        (np.array([[0, 70_000]], np.int32), "values from 0 to 70000, expected 0 to 65535"),
        (np.array([[0, np.nan]], np.float32), "contains values that are not finite numbers"),
        (np.array([[0, np.inf]], np.float32), "contains values that are not finite numbers"),
    ],
)
def test_values_out_of_range_are_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        decoded(encoded(values, kind="TIFF"))


ORIENTATIONS = [
    (1, [[1, 2], [3, 4], [5, 6]]),
    (2, [[2, 1], [4, 3], [6, 5]]),
    (3, [[6, 5], [4, 3], [2, 1]]),
    (4, [[5, 6], [3, 4], [1, 2]]),
    (5, [[1, 3, 5], [2, 4, 6]]),
    (6, [[5, 3, 1], [6, 4, 2]]),
    (7, [[6, 4, 2], [5, 3, 1]]),
    (8, [[2, 4, 6], [1, 3, 5]]),
]


@pytest.mark.parametrize(("orientation", "expected"), ORIENTATIONS)
@pytest.mark.parametrize("deep", [False, True])
def test_exif_orientation_is_applied(orientation, expected, deep):
    values = np.array([[1, 2], [3, 4], [5, 6]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = (values * 257).astype(np.uint16) if deep else values.astype(np.uint8)
    file = encoded(image, exif=exif)
    assert decoded(file) == expected
    assert info_of(file).rotated is (orientation != 1)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_invalid_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decoded(encoded(np.array([[1, 2]], np.uint8), exif=exif)) == [[1, 2]]


def test_first_frame_of_animated_files_is_used():
    frames = [Image.new("L", (4, 4), value) for value in (10, 20, 30)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        file = encoded(frames[0], kind=kind, save_all=True, append_images=frames[1:], **lossless)
        assert np.array(decoded(file)).reshape(16, -1)[:, 0].tolist() == [10] * 16, kind
        assert info_of(file).animated


def test_color_profile_is_not_applied_but_reported():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb = np.array([[[10, 20, 30]]], np.uint8)
    file = encoded(rgb, icc_profile=profile)
    assert decoded(file) == rgb.tolist()
    assert info_of(file).icc
    assert not info_of(encoded(rgb)).icc


# Channels


def test_image_without_color_is_gray_in_any_mode():
    values = noise(4, 4)
    assert read(encoded(values, "RGB")).tolist() == [values.tolist()]
    almost = np.repeat(values[:, :, None], 3, axis=2)
    almost[3, 3, 2] ^= 1
    assert read(encoded(almost)).tolist() == almost.transpose(2, 0, 1).tolist()


def test_channels_are_configurable():
    values = noise(4, 4)
    assert read(encoded(values), channels=3).tolist() == [values.tolist()] * 3
    red = read(encoded(np.full((4, 4, 3), (255, 0, 0), np.uint8)), channels=1)
    assert red.tolist() == [[[round(255 * 0.299)] * 4] * 4]  # luma of ITU-R 601


# Transparency as the fourth channel


def rgba_of(file: bytes, **settings) -> list:
    """[H, W, 4] of a file that is trained with its transparency, as nested lists."""
    return read(file, channels=4, **settings).transpose(1, 2, 0).tolist()


def test_transparency_is_kept_and_hidden_colors_are_black():
    rgba = np.array([[[9, 8, 7, 255], [100, 50, 0, 51], [200, 100, 50, 0]]] * 3, np.uint8)
    file = encoded(rgba)
    expected = [[9, 8, 7, 255], [100, 50, 0, 51], [0, 0, 0, 0]]
    assert rgba_of(file, resolution=3) == [expected] * 3
    assert decode.decode_image(io.BytesIO(file), None)[1].alpha
    opaque = rgba_of(encoded(np.ascontiguousarray(rgba[..., :3])), resolution=3)
    assert opaque[0] == [[9, 8, 7, 255], [100, 50, 0, 255], [200, 100, 50, 255]]
    everywhere = decode.decode_image(io.BytesIO(encoded(photo(4).convert("RGBA"))), None)[1]
    assert not everywhere.alpha  # an alpha channel without a transparent pixel


def test_every_kind_of_transparency_becomes_a_fourth_channel():
    la = np.array([[[100, 255], [100, 51]], [[7, 0], [7, 255]]], np.uint8)
    expected = [[[100, 100, 100, a] for a in (255, 51)], [[0] * 4, [7, 7, 7, 255]]]
    assert rgba_of(encoded(Image.fromarray(la, "LA")), resolution=2) == expected
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert rgba_of(encoded(palette, transparency=1), resolution=2) == [
        [[255, 0, 0, 255], [0] * 4],
        [[0] * 4, [255, 0, 0, 255]],
    ]
    values = [[[257, 514, 65535, 65535], [9, 9, 9, 0]]] * 2
    file = png(values, 6)
    assert rgba_of(file, resolution=2) == [[[1, 2, 255, 255], [0] * 4]] * 2


def test_resizing_weights_colors_by_their_alpha():
    """Opaque red next to hidden green: plain resizing would blend in the green."""
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, :2] = (255, 0, 0, 255)
    rgba[:, 2:] = (0, 255, 0, 0)
    pixels = np.array(rgba_of(encoded(rgba), resolution=2))
    assert (pixels[..., 1:3] == 0).all()
    assert (pixels[..., 0][pixels[..., 3] > 0] == 255).all()
    assert 0 < pixels[0, 1, 3] < pixels[0, 0, 3] < 255


def test_pad_is_transparent_with_four_channels():
    pixels = rgba_of(encoded(np.full((4, 8), 77, np.uint8)), resize_mode="pad")
    assert [row[0] for row in pixels] == [[0] * 4, [77, 77, 77, 255], [77, 77, 77, 255], [0] * 4]


# Geometry


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 16), (4, 8)),
        ((20, 10), (8, 4)),
        ((4, 4), (4, 4)),
        ((2, 3), (4, 6)),
        ((1, 1), (4, 4)),
        ((5, 7), (4, 5)),
    ],
)
def test_short_side_becomes_the_resolution(shape, expected):
    assert read(encoded(noise(*shape))).shape == (1, *expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 12), (4, 6)),
        ((4, 6), (4, 6)),
        ((12, 8), (9, 6)),  # portraits are not turned
        ((8, 40), (4, 20)),
        ((1, 1), (6, 6)),
        ((5, 7), (4, 6)),
        ((3000, 1), (60, 6)),  # cropped to 10x1
    ],
)
def test_rectangle_is_covered(shape, expected):
    """One side becomes that of the resolution, 4 high and 6 wide here, the other is no shorter."""
    pixels = read(encoded(noise(*shape)), resolution=(4, 6))
    assert pixels.shape == (1, *expected)
    assert read(encoded(noise(*shape)), resolution=(4, 6), center_crop=True).shape == (1, 4, 6)


def test_rectangle_keeps_the_whole_image_with_pad_and_stretch():
    wide, tall = (encoded(np.full(shape, 77, np.uint8)) for shape in ((4, 8), (8, 4)))
    settings = {"resolution": (2, 6), "background": "black"}
    padded = read(wide, **settings, resize_mode="pad")
    assert padded.tolist() == [[[0, 77, 77, 77, 77, 0]] * 2]
    assert read(tall, **settings, resize_mode="pad").tolist() == [[[0, 0, 77, 0, 0, 0]] * 2]
    assert read(tall, **settings, resize_mode="stretch").tolist() == [[[77] * 6] * 2]


def test_rectangle_gets_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees to be seen
    file = encoded(np.tile(np.arange(8, dtype=np.uint8), (4, 1)), exif=exif)
    pixels = read(file, resolution=(8, 4))
    assert pixels.tolist() == [[[row] * 4 for row in range(8)]]
    assert info_of(file).upright_size == (8, 4)
    assert (info_of(file).width, info_of(file).height) == (8, 4)


def test_resizing_is_antialiased():
    """A fine checkerboard becomes its mean; every third pixel of it would be black or white."""
    board = (np.indices((12, 12)).sum(0) % 2 * 255).astype(np.uint8)
    assert (np.abs(read(encoded(board)).astype(int) - 127) < 30).all()


def test_resizing_equals_torchvision():
    from torchvision.transforms import v2

    picture = photo(37)
    expected = v2.Resize(8)(picture)
    assert np.array_equal(read(encoded(picture), resolution=8).transpose(1, 2, 0), expected)


def test_center_crop_keeps_the_middle():
    columns = np.tile(np.arange(12, dtype=np.uint8), (4, 1))
    assert read(encoded(columns), center_crop=True).tolist() == [[[4, 5, 6, 7]] * 4]


def test_stretch_ignores_the_aspect():
    halves = np.zeros((4, 8), np.uint8)
    halves[:, 4:] = 200
    pixels = read(encoded(halves), resize_mode="stretch")
    assert pixels.shape == (1, 4, 4)
    assert pixels[0, 0, 0] == 0
    assert pixels[0, 0, 3] == 200


@pytest.mark.parametrize(("background", "paper"), [("black", [0]), ("#646464", [100])])
def test_pad_keeps_the_aspect_between_margins(background, paper):
    pixels = read(encoded(np.full((4, 8), 77, np.uint8)), resize_mode="pad", background=background)
    assert pixels.tolist() == [[paper * 4, [77] * 4, [77] * 4, paper * 4]]


def test_pad_with_a_color_makes_gray_images_rgb():
    pixels = read(encoded(np.full((4, 2), 77, np.uint8)), resize_mode="pad", background="#ff0000")
    assert pixels[:, 0].tolist() == [[255, 77, 77, 255], [0, 77, 77, 0], [0, 77, 77, 0]]
    asked = read(gray(77, size=2)[0], resize_mode="pad", background="#ff0000", channels=1)
    assert asked.shape == (1, 4, 4)


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 700)])
def test_extreme_aspect_stays_small(mode, shape):
    pixels = read(encoded(noise(*shape)), resize_mode=mode)
    assert min(pixels.shape[1:]) == 4
    assert max(pixels.shape[1:]) <= 4 * decode.MAX_ASPECT
    if mode == "crop":
        assert read(encoded(noise(*shape)), center_crop=True).shape == (1, 4, 4)


# Limits


def test_hundred_megapixels_are_read():
    file = encoded(Image.new("1", (10_000, 10_000), 1))
    assert len(file) < 100_000
    assert read(file, channels=1).tolist() == [[[255] * 4] * 4]


@pytest.mark.parametrize("side", [12_000, 60_000, 2**31 - 1])
def test_larger_images_are_refused_by_their_header(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)  # nothing may be decoded
    with pytest.raises(decode.DecodeError, match="pixels are more than|more pixels than the"):
        read(header(side, side) + chunk(b"IDAT", b"no pixels"))


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    entered = []
    monkeypatch.setattr(decode, "LARGE_IMAGE_PIXELS", 15)

    class Lock:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(decode, "_large_image_lock", Lock())
    read(gray(1, size=3)[0])
    assert entered == []
    read(gray(1, size=4)[0])
    assert entered == [1]


def test_eps_is_refused_because_reading_it_would_execute_it():
    file = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(file)).format == "EPS"  # Pillow alone would start Ghostscript
    with pytest.raises(decode.DecodeError, match="not a readable image"):
        read(file)


# Settings


@pytest.mark.parametrize("text", ["wite", "", "#12345", "rgb(1,2"])
def test_invalid_background_is_refused(text):
    with pytest.raises(UsageError, match="is not a color. Give white, black or #rrggbb"):
        decode_config(background=text)


@pytest.mark.parametrize("text", ["", "5", "1,0", "0,nan", "0,inf", "a,b", "0,1,2"])
def test_invalid_value_range_is_refused(text):
    with pytest.raises(UsageError, match=r"is not a range\. Give the values of black and white"):
        decode_config(value_range=text)


def test_value_range_and_background_are_parsed():
    assert decode_config(value_range="-1,1").value_range == (-1.0, 1.0)
    assert decode_config(background="#010203").background == (1, 2, 3)
    assert decode_config(background="black").background == BLACK
