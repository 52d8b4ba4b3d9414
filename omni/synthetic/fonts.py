"""The fonts of the signs: those of Matplotlib, the one built into Pillow, and those of packages that hold one family.

A font's name is its file's. docs/data.md lists the packages and their licences.
"""

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from omni.synthetic.pictures import FONT_FOLDER

_FOUR = ("", "-Bold", "-Oblique", "-BoldOblique")
_DISPLAY = ("Regular", "Italic", "Light", "LightItalic", "Medium", "MediumItalic", "Bold", "BoldItalic", "Black")
_SOURCE = ("Regular", "It", "Light", "LightIt", "Semibold", "SemiboldIt", "Bold", "BoldIt", "Black", "BlackIt")
# Kind -> family -> its styles. A kind, then a family, then a style is drawn: a family with many has no more signs.
_FAMILIES = {
    "sans": {
        "DejaVuSans": _FOUR,
        "Roboto-": _DISPLAY,
        "Lato-": tuple(style for style in _DISPLAY if "Medium" not in style),
        "Manrope-": ("Light", "Regular", "Medium", "SemiBold", "Bold", "ExtraBold"),
        "RedHatDisplay-": _DISPLAY,
        "SourceSansPro-": _SOURCE,
        "HankenGrotesk-": ("Regular", "Italic", "Light", "LightItalic", "Medium", "SemiBold", "Bold", "BoldItalic"),
        "FredokaOne-": ("Regular",),
        "FjallaOne-": ("Regular",),
    },
    "serif": {
        "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
        # Computer Modern has an old encoding, and so have STIX's other faces
        "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
        "SourceSerifPro-": _SOURCE,
        "Caladea-": ("Regular", "Italic", "Bold", "BoldItalic"),
    },
    "mono": {"DejaVuSansMono": _FOUR},
}
KINDS = {"sans": 45, "serif": 45, "mono": 10}  # weights
_PACKAGES = {
    "Roboto-": "font_roboto",
    "Lato-": "font_lato",
    "Manrope-": "font_manrope",
    "RedHatDisplay-": "font_rhd",
    "SourceSansPro-": "font_source_sans_pro",
    "HankenGrotesk-": "font_hanken_grotesk",
    "FredokaOne-": "font_fredoka_one",
    "FjallaOne-": "font_fjallaone",
    "SourceSerifPro-": "font_source_serif_pro",
    "Caladea-": "font_caladea",
}  # the rest is Matplotlib's


def _names(family: str, styles: tuple[str, ...]) -> Iterator[str]:
    suffix = "otf" if family == "HankenGrotesk-" else "ttf"
    return (f"{family}{style}.{suffix}" for style in styles)


# kind -> the names of each family
TRAINING = {
    kind: tuple(tuple(_names(family, styles)) for family, styles in families.items())
    for kind, families in _FAMILIES.items()
}
HELD_OUT = ("Aileron", "cmss10.ttf", "cmr10.ttf", "cmb10.ttf")  # Pillow's and Matplotlib's


@cache
def font_file(name: str) -> Path:
    """The file of a font of ``TRAINING`` or ``HELD_OUT``. Packages are found, not imported, which would be slow."""
    package = _PACKAGES.get(name.partition("-")[0] + "-")
    return Path(find_spec(package).origin).parent / "files" / name if package else FONT_FOLDER / name
