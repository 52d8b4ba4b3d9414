"""espeak-ng (GPL-3, a library of its own): a synthesiser by rule, and the phonemes of words in the International
Phonetic Alphabet."""

import ctypes
import importlib.metadata
import re
import threading
import unicodedata
from functools import cache, lru_cache

import numpy as np

from omni.common.errors import UserError

# Constants of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2  # the call returns when all is said, and hands the samples to a callback
_RATE, _PITCH = 1, 3  # parameters
_BUFFER_MS = 1000  # what one call of the callback gets: the library's default, 60 ms, costs a quarter more time
_RETURN_ERRORS = 0x8000  # else the library ends the process
_LONGEST_PATH = 159  # bytes, of its data
_CHARS_UTF8 = 1
_PHONEMES_IPA = 2
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

# A punctuation mark at a clause's end. The library has read one letter of the next clause by then.
_CLAUSE_END = re.compile(r"""([.,;:!?])["')\]]*\s*\w?$""")


class EspeakLibrary:
    """espeak-ng's C interface. One per process, ``espeak_library()``, since the library has one state.

    Raises:
        UserError: its package is missing; or it does not start, as its data are missing or have a long path.
        RuntimeError: it does not know a voice.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader  # here: letters are spoken without it
        except ImportError as error:
            raise UserError("phonemes need the package espeakng-loader, see requirements.txt") from error
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        library.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self.library = library
        self._chunks: list[np.ndarray] = []
        self._voice = ""
        self._callback = _CALLBACK(self._receive)  # kept: the library holds only its address
        data = espeakng_loader.get_data_path().encode()
        # Hz: 22050
        self.sample_rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MS, data, _RETURN_ERRORS)
        if self.sample_rate <= 0:
            raise UserError(
                f"espeak-ng does not start with its data in {data.decode()} ({len(data)} bytes). Expected a path of at "
                f"most {_LONGEST_PATH} bytes, and the files of the package espeakng-loader in it"
            )
        library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, n_samples: int, events) -> int:
        if samples and n_samples:
            self._chunks.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        return 0

    def _set_voice(self, voice: str) -> None:
        self._voice = voice
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f'espeak-ng has no voice "{voice}"')

    def speak(self, text: str, voice: str, words_per_minute: int, pitch: int, seed: int) -> np.ndarray:
        """Samples (n,), int16, at ``sample_rate``. ``pitch`` is 0 to 99; ``seed`` is for the breath in some voices."""
        self._chunks.clear()
        self._set_voice(voice)
        # choosing a voice sets both to its own
        self.library.espeak_SetParameter(_RATE, words_per_minute, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        self.library.espeak_ng_SetRandSeed(seed)
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _CHARS_UTF8, None, None)
        return np.concatenate(self._chunks)

    def phonemes(self, text: str, voice: str) -> list[tuple[str, str]]:
        """The clauses of a text, each as (phonemes in IPA, the punctuation mark at its end, "" for none)."""
        if voice != self._voice:  # its rules and dictionary are read from files
            self._set_voice(voice)
        data = text.encode()
        buffer = ctypes.create_string_buffer(data)
        start = ctypes.addressof(buffer)
        position = ctypes.c_void_p(start)
        clauses = []
        while position.value:  # the library sets it to NULL at the end
            begin = position.value - start
            ipa = self.library.espeak_TextToPhonemes(ctypes.byref(position), _CHARS_UTF8, _PHONEMES_IPA)
            end = position.value - start if position.value else len(data)
            mark = _CLAUSE_END.search(data[begin:end].decode(errors="replace"))
            clauses.append((ipa.decode(), mark[1] if mark else ""))
        return clauses


espeak_library = cache(EspeakLibrary)


_ACCENT = "en-us"
_LONGEST = 50  # letters of a word
_LAST_LETTER = "\u017f"  # of those that it knows; it names others by their codes
_APOSTROPHES = {ord("’"): "'", ord("\u02bc"): "'"}
_TURN = threading.Lock()  # the library has one state, and ctypes lets other threads run
_OTHER_LANGUAGE = re.compile(r"\([a-z-]+\)")  # espeak-ng's remark around a word that it reads as another language's


@lru_cache(maxsize=100_000)
def word_in_ipa(word: str) -> str:
    """An English word by itself: "hello" is həlˈoʊ, and "FBI" is spelled. Letters that the library does not know lose
    their accents. A word with others, one that is too long, and one without phonemes stay as they are.

    Raises:
        UserError: see ``EspeakLibrary``; or its dictionary is missing.
    """
    if len(word) > _LONGEST:
        return word
    plain = unicodedata.normalize("NFKC", word).translate(_APOSTROPHES)
    if max(plain) > _LAST_LETTER:
        plain = "".join(c for c in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(c))
        if max(plain) > _LAST_LETTER:
            return word
    with _TURN:
        clauses = _english().phonemes(plain, _ACCENT)
    return _OTHER_LANGUAGE.sub("", "".join(ipa for ipa, _ in clauses)).strip() or word


@cache
def _english() -> EspeakLibrary:
    library = espeak_library()
    if (found := library.phonemes("hello", _ACCENT)) != [("həlˈoʊ", "")]:
        raise UserError(f"espeak-ng reads hello as {found[0][0]}: its English dictionary is missing or another one")
    return library


def ipa_version() -> str:
    """What the phonemes depend on beside the word.

    Raises:
        UserError: see ``word_in_ipa``; asked before training, this is not said of each row.
    """
    with _TURN:
        _english()
    return f"{_ACCENT}-{importlib.metadata.version('espeakng-loader')}"
