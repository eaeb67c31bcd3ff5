#!/usr/bin/env python3
"""Print the tokenizer's character tables as C: letters, numbers and white space.

    python3 make_unicode.py >tables.txt

Each table is a list of pairs (gap, length): the code points left out since the end of the
previous range, then the size of the range. Delta-coded like this every value fits 16 bits.
Letters are the general categories L*, numbers Nd, Nl and No, of python's own unicodedata;
White_Space is a property which that module lacks, so it is spelt out here (PropList.txt).
"""
import sys
import textwrap
import unicodedata

INDENT = " " * 4
WHITE_SPACE = frozenset((*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B),
                         0x2028, 0x2029, 0x202F, 0x205F, 0x3000))


def is_letter(code):
    return unicodedata.category(chr(code)).startswith("L")


def is_number(code):
    return unicodedata.category(chr(code)).startswith("N")


def is_space(code):
    return code in WHITE_SPACE


def delta_pairs(belongs):
    """The code points for which belongs() holds, as [gap, length, gap, length, ...]."""
    pairs = []
    previous_end = 0                      # one past the last code point of the previous range
    start = None
    for code in range(sys.maxunicode + 2):
        inside = code <= sys.maxunicode and belongs(code)
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            pairs += [start - previous_end, code - start]
            previous_end, start = code, None
    return pairs


def packed(values):
    """The values, comma-separated, in lines as long as the column limit allows."""
    return textwrap.fill(" ".join(f"{value}," for value in values), 100, initial_indent=INDENT,
                         subsequent_indent=INDENT)


def main():
    print(f"// Unicode {unicodedata.unidata_version}, printed by tests/helpers/make_unicode.py:"
          " pairs of gap and length")
    for name, belongs in (("letter_ranges", is_letter), ("number_ranges", is_number),
                          ("space_ranges", is_space)):
        pairs = delta_pairs(belongs)
        if max(pairs) > 0xFFFF:
            raise SystemExit(f"{name}: {max(pairs)} does not fit uint16_t")
        print(f"static const uint16_t {name}[] = {{\n{packed(pairs)}\n}};")


if __name__ == "__main__":
    main()
