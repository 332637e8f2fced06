"""The grammar of a judge's answer: numbers separated by commas, in single-character tokens, for greedy decoding among them."""

from dataclasses import dataclass
from typing import Any

from ..errors import UserError

SEPARATOR = ", "
CHARACTERS = "0123456789."
TENTHS = tuple(f"{tenth / 10:.1f}" for tenth in range(101))  # 0.0 to 10.0
ONE_TO_FIVE = tuple("12345")


@dataclass(frozen=True)
class RatingGrammar:
    """`count` of the numbers, such as `7.5, 10.0`; `capped`: none of them above the first."""

    characters: dict[int, str]  # token -> character
    separator: tuple[int, ...]  # tokens
    eos_token_id: int
    numbers: tuple[str, ...] = TENTHS  # as they are spelt; none begins another
    count: int = 2
    capped: bool = False

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, numbers: tuple[str, ...] = TENTHS, count: int = 2, capped: bool = False) -> "RatingGrammar":
        """Looks up the token ids. Raises UserError for a tokenizer without single-digit tokens."""
        ids = {tokenizer.convert_tokens_to_ids(character): character for character in CHARACTERS}
        if None in ids or tokenizer.unk_token_id in ids or len(ids) < len(CHARACTERS):
            raise UserError("the tokenizer has no tokens of single digits", expected="Qwen3-VL's own")
        return cls(ids, tuple(tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]), tokenizer.eos_token_id, numbers, count, capped)

    @property
    def max_tokens(self) -> int:
        """Length of the longest answer, including the end-of-sequence token."""
        return self.count * max(map(len, self.numbers)) + (self.count - 1) * len(self.separator) + 1

    def allowed_tokens(self, answer: list[int]) -> list[int]:
        """The tokens that may follow the answer so far, at least one."""
        return self._read(answer)[1]

    def parse(self, answer: list[int]) -> tuple[float, ...]:
        """The numbers of a complete answer. Raises UserError for any other."""
        numbers, following = self._read(answer)
        if following != [self.eos_token_id]:
            raise UserError("the judge's answer is no number", got=f"{len(numbers)} of {self.count} numbers in tokens {answer}")
        return tuple(map(float, numbers))

    def _read(self, answer: list[int]) -> tuple[list[str], list[int]]:
        """The complete numbers of an answer, and the tokens that may follow; none of those if the answer breaks the grammar."""
        read: list[str] = []
        rest = answer
        while True:
            possible = [number for number in self.numbers if not (self.capped and read and float(number) > float(read[0]))]
            number = ""
            while number not in possible:
                following = {other[len(number)] for other in possible if other.startswith(number)}
                if not rest:
                    return read, [token for token, character in self.characters.items() if character in following]
                if self.characters.get(rest[0]) not in following:
                    return read, []
                number, rest = number + self.characters[rest[0]], rest[1:]
            read.append(number)
            if len(read) == self.count:
                return read, [self.eos_token_id] if not rest or rest == [self.eos_token_id] else []
            for token in self.separator:
                if not rest:
                    return read, [token]
                if rest[0] != token:
                    return read, []
                rest = rest[1:]
