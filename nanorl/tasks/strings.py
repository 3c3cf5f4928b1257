"""Tasks on strings: sort digits, reverse a word."""
# ruff: noqa: SIM905      (a line of words reads better than a list of quoted ones)

from nanorl.tasks.base import Problem, Task, worked_response


class Sorting(Task):
    """Sort 73913.    7, 37, 379, 1379, 13379. Answer: 13379

    A control: attention can sort in one step, so that working need not pay here.
    """

    name, difficulty_unit = "sorting", "digits to sort"
    difficulties, default_difficulty = range(2, 17), 8

    def draw(self, rng):
        digits = "".join(rng.choice("0123456789") for _ in range(self.difficulty))
        return Problem(f"Sort {digits}.", "".join(sorted(digits)))

    def work(self, problem, rng):
        """Insertion sort: step n has the first n digits in order, which is the previous step with one digit inserted."""
        digits = problem.prompt.removeprefix("Sort ").removesuffix(".")
        return worked_response(("".join(sorted(digits[:n])) for n in range(1, len(digits) + 1)), problem.answer)


class Reversal(Task):
    """Reverse plonta.    p l o n t a, a t n o l p. Answer: atnolp"""

    name, difficulty_unit = "reversal", "letters"
    difficulties, default_difficulty = range(3, 13), 6
    onsets = "b d f g k l m n p r s t v bl br dr fl gr kl pl pr sk sl sn sp st tr".split()
    codas = "l m n r s".split()

    def draw(self, rng):
        """A made-up word, syllable by syllable; one that grows too long is started over."""
        word = ""
        while len(word) != self.difficulty:
            syllable = rng.choice(self.onsets) + rng.choice("aeiou") + rng.choice(["", rng.choice(self.codas)])
            word = word + syllable if len(word) < self.difficulty else ""
        return Problem(f"Reverse {word}.", word[::-1])

    def work(self, problem, rng):
        """Tokens hide their letters, so the word is spelled first and then reversed."""
        return worked_response((" ".join(problem.answer[::-1]), " ".join(problem.answer)), problem.answer)
