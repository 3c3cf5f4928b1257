"""Chat templates by hand: where the special tokens of a conversation stand, for the families that nanorl knows.

A model's files bring their template as a Jinja program. It is never run: its text only tells the family, by how the assistant's
turn begins, and what the model adds of its own, such as a default system message.
"""

import re
from dataclasses import dataclass

from nanorl.errors import UserError
from nanorl.files import Message

# family: what comes first, a turn, and what ends a turn of the assistant
FAMILIES = {
    "nanorl": ("<|bos|>", "<|{role}|>{content}", "<|end|>"),
    "chatml": ("", "<|im_start|>{role}\n{content}<|im_end|>\n", ""),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>", ""),
}
SPECIAL = re.compile(r"(<\|\w+\|>)")

# Llama 3.1 and later begin every conversation with two dates. The second is the one that their template falls back on: with
# today's, a run would not be the same tomorrow.
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@dataclass(frozen=True)
class Template:
    """How a conversation becomes special tokens and text. The family "plain", of base models, writes the messages alone, with a
    blank line between them."""

    family: str
    start: str = ""                 # the special token before a text that is no conversation, if any
    system: str = ""                # the system message of a conversation that has none
    dates: bool = False             # Llama: LLAMA_DATES come before the system message
    forget_thoughts: bool = False   # Qwen3: what stands before </think> is left out of the assistant's earlier turns

    def __post_init__(self):
        if self.family not in ("plain", *FAMILIES):
            raise UserError(f"the chat template {self.family!r:.40}; expected plain or one of {', '.join(FAMILIES)}")

    def render(self, messages: list[Message]) -> list[tuple[str, str]]:
        """A conversation up to where the assistant speaks: (special token, the text after it), ...; "" stands for no token.

        The last message must be the user's.
        """
        for message in messages:
            if message.keys() != {"role", "content"} or message["role"] not in ("system", "user", "assistant"):
                raise UserError(f"the message {message!r:.80}; expected a role (system, user or assistant) and a content")
        if not messages or messages[-1]["role"] != "user":
            raise UserError(f"{len(messages)} messages; expected the last one to be the user's")
        turns = [(message["role"], message["content"]) for message in messages]
        if self.family == "plain":
            return [(self.start, "\n\n".join(content for _, content in turns))]
        if self.family == "nanorl" and turns[0][0] == "system":
            raise UserError("a system message; expected none: the models that nanorl trained know none")
        if (self.system or self.dates) and turns[0][0] != "system":
            turns = [("system", self.system), *turns]

        first, turn, end = FAMILIES[self.family]
        pieces = [(first, "")] if first else []
        for i, (role, content) in enumerate(turns):
            if self.family == "llama3":
                content = LLAMA_DATES * (self.dates and i == 0) + content.strip()
            if self.forget_thoughts and role == "assistant" and "</think>" in content:
                content = content.split("</think>")[-1].lstrip("\n")
            whole = SPECIAL.split(turn.replace("{role}", role) + end * (role == "assistant"))
            pieces += zip(whole[1::2], (text.replace("{content}", content) for text in whole[2::2]), strict=True)
        whole = SPECIAL.split(assistant_begins(self.family))
        return [*pieces, *zip(whole[1::2], whole[2::2], strict=True)]

    def jinja(self) -> str | None:
        """The chat template that makes transformers render the same; None of the family "plain"."""
        if self.family == "plain":
            return None

        def quoted(text: str) -> str:
            return "'" + text.replace("\\", "\\\\").replace("\n", "\\n") + "'"

        first, turn, end = FAMILIES[self.family]
        role, content, default = "message['role']", "message['content']", ""
        if self.family == "llama3":
            dates = quoted(LLAMA_DATES * self.dates)
            content = f"({dates} if loop.first and {role} == 'system' else '') + {content} | trim"
        if self.forget_thoughts:
            content = (f"({content}.split('</think>')[-1].lstrip('\\n') if {role} == 'assistant' and '</think>' in {content} "
                       f"and not loop.last else {content})")
        if self.system or self.dates:
            text = turn.replace("{role}", "system").replace("{content}", LLAMA_DATES * self.dates + self.system)
            default = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {quoted(text)} }}}}{{% endif %}}"
        said = quoted(turn).replace("{role}", f"' + {role} + '").replace("{content}", f"' + {content} + '")
        return (f"{{{{ {quoted(first)} }}}}{default}{{% for message in messages %}}"
                f"{{{{ {said} + ({quoted(end)} if {role} == 'assistant' else '') }}}}{{% endfor %}}"
                f"{{% if add_generation_prompt %}}{{{{ {quoted(assistant_begins(self.family))} }}}}{{% endif %}}")


def assistant_begins(family: str) -> str:
    return FAMILIES[family][1].split("{content}")[0].replace("{role}", "assistant")


def end_of_turn(family: str) -> str:
    """The special token that ends what the assistant says."""
    _, turn, end = FAMILIES[family]
    return SPECIAL.search(turn.split("{content}")[1] + end)[0]


def recognise(jinja: str | None, special: dict[str, int], start: str) -> Template:
    """The template that a Jinja program stands for, or "plain" where there is none; UserError where nanorl knows none like it.

    special: the tokenizer's special tokens; start: the one that it puts before every text, or "".
    """
    if jinja is None:
        return Template("plain", start)
    text = jinja.replace("\\n", "\n")
    for family in FAMILIES:
        begins, example = assistant_begins(family), Template(family).render([{"role": "user", "content": ""}])
        tokens = {end_of_turn(family), *(token for token, _ in example)}
        if (f"{begins}'" in text or f'{begins}"' in text) and tokens <= special.keys():
            dates = "Cutting Knowledge Date" in text
            # A default system message follows its header in one string; without one, the string ends at the header.
            default = re.search(r"(?:<\|im_start\|>system\n|>system<\|end_header_id\|>\n\n)([^'\"].*?)<\|", text, re.S)
            system = default[1].replace("\\\\", "\\") if default and not dates else ""
            if not re.search("['\"]", system):
                return Template(family, start, system, dates, "</think>" in text)
    raise UserError("its chat template is none that nanorl knows; expected ChatML's or Llama 3's, as Qwen, SmolLM2 and Llama "
                    "have it, or none, as base models have")
