"""SmolLM's tokenizer in its plainest form, for the C one to be compared with."""
import re
import struct
import unicodedata

from make_unicode import WHITE_SPACE

# GPT-2's pattern for text in which every character beyond ASCII has been replaced by an ASCII one
# of its kind; re.ASCII, so that \s is white space up to U+007F.
PIECE = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
                   re.ASCII)
NUMERIC = re.compile(r"([0-9])")
STAND_IN_LETTER, STAND_IN_NUMBER, STAND_IN_SPACE, STAND_IN_OTHER = "A0\t#"


def characters(data):
    """Pairs of a character's bytes and the character itself or its ASCII stand-in."""
    # "surrogateescape" turns each byte that is not part of valid UTF-8 into a surrogate of its own,
    # whose category Cs is neither letter nor number; back again it is the same byte.
    for char in data.decode("utf-8", "surrogateescape"):
        category = unicodedata.category(char)
        if char.isascii():
            stand_in = char
        elif category.startswith("L"):
            stand_in = STAND_IN_LETTER
        elif category in ("Nd", "Nl", "No"):
            stand_in = STAND_IN_NUMBER
        elif ord(char) in WHITE_SPACE:
            stand_in = STAND_IN_SPACE
        else:
            stand_in = STAND_IN_OTHER
        yield char.encode("utf-8", "surrogateescape"), stand_in


def cut(data):
    """Pre-tokenize: the pieces of a text, within which bytes are merged."""
    chars = list(characters(data))
    pieces, start = [], 0
    for stretch in NUMERIC.split("".join(stand_in for _, stand_in in chars)):
        for piece in PIECE.findall(stretch):
            end = start + len(piece)
            pieces.append(b"".join(raw for raw, _ in chars[start:end]))
            start = end
    return pieces


class Tokenizer:
    def __init__(self, path):
        self.texts = []
        self.tokens = {}                  # text: (score, id), the lowest id if several are alike
        with open(path, "rb") as file:
            data = file.read()
        at = 4                            # after max_token_length
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            text = data[at:at + length]
            at += length
            self.tokens.setdefault(text, (score, len(self.texts)))
            self.texts.append(text)

    def merge(self, piece):
        """Byte-level BPE: the ids of one piece, whose best pair is merged again and again."""
        parts = [piece[i:i + 1] for i in range(len(piece)) if piece[i:i + 1] in self.tokens]
        while True:
            best = None
            for i in range(len(parts) - 1):
                token = self.tokens.get(parts[i] + parts[i + 1])
                if token and (best is None or token[0] > best[0]):
                    best = (token[0], i)
            if best is None:
                return [self.tokens[part][1] for part in parts]
            i = best[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]

    def encode(self, data):
        """The ids of a plain text, given as bytes."""
        return [token for piece in cut(data) for token in self.merge(piece)]
