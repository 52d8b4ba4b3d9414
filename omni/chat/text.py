"""Text of users and models: cleaning, removal of control characters, and file names in it."""

import contextlib
import os
import re
import shlex
import urllib.parse

from omni.common.errors import BadRow, UserError
from omni.common.media import Media, is_data_uri, parse_data_uri

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all of C0 and C1 but tab and line feed
_FILE_URL = re.compile("file:(?://(?:localhost)?)?(/.*)", re.IGNORECASE | re.DOTALL)


def clean(text: str) -> str:
    """Replace lone surrogates, which no tokenizer accepts; Python decodes invalid UTF-8 to them."""
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)  # surrogates that stand for no byte
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def without_controls(text: str) -> str:
    """``text`` without the characters that would move a terminal's cursor or change its state."""
    return _CONTROLS.sub("", text)


def media_named(text: str) -> Media:
    """The data URI or file that ``text`` names, literally or in the spelling of a shell, file manager or browser.

    Raises:
        UserError: a data URI is malformed.
    """
    if is_data_uri(text):
        try:
            return parse_data_uri(text)
        except BadRow as error:
            raise UserError(str(error)) from error
    names = [text]
    with contextlib.suppress(ValueError):  # an unpaired quotation mark, as in it's.png
        if len(words := shlex.split(text)) == 1:  # 'my cat.png', my\ cat.png
            names += words
    urls = [url[1] for name in names if (url := _FILE_URL.match(name))]
    names += [urllib.parse.unquote(path, errors="surrogateescape") for path in urls]
    names += [os.path.expanduser(name) for name in names]
    return next((name for name in names if os.path.lexists(name)), text)
