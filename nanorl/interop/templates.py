"""Chat templates by hand: where the special tokens of a conversation stand, for the families that nanorl knows.

A model's files bring their template as a Jinja program. It is never run: its text only tells the family, by how the assistant's
turn begins, and what the model adds of its own, such as a default system message.
"""

import re
from dataclasses import dataclass

from nanorl.errors import UserError

Message = dict[str, str]            # {"role": "system", "user" or "assistant", "content": text}

# family: how the assistant's turn begins, and the special token that ends it
FAMILIES = {
    "nanorl": ("<|assistant|>", "<|end|>"),
    "chatml": ("<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
}

# Llama 3.1 and later begin every conversation with two dates. The second is the one that their template falls back on: with
# today's, a run would not be the same tomorrow.
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@dataclass(frozen=True)
class Template:
    """How a conversation becomes special tokens and text. The family "plain", of base models, writes the last message alone."""

    family: str
    system: str = ""                # the system message of a conversation that has none
    dates: bool = False             # Llama: LLAMA_DATES come before the system message
    forget_thoughts: bool = False   # ChatML: what stands before </think> is left out of the assistant's earlier turns
    start: str = ""                 # the special token before a text that is no conversation, if any

    def __post_init__(self):
        if self.family not in ("plain", *FAMILIES):
            raise UserError(f"chat template {self.family!r:.40}: expected plain or one of {', '.join(FAMILIES)}")

    def render(self, messages: list[Message]) -> list[tuple[str, str]]:
        """A conversation up to where the assistant speaks: (special token, the text after it), ...; "" stands for no token.

        The last message must be the user's.
        """
        for message in messages:
            if message.keys() != {"role", "content"} or message["role"] not in ("system", "user", "assistant"):
                raise UserError(f"message {message!r:.80}: expected a role (system, user or assistant) and a content")
        if not messages or messages[-1]["role"] != "user":
            raise UserError(f"{len(messages)} messages: expected the last one to be the user's")
        if (self.system or self.dates) and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        turns = [(message["role"], message["content"]) for message in messages]

        match self.family:
            case "plain":
                return [(self.start, turns[-1][1])]
            case "nanorl":
                if turns[0][0] == "system":
                    raise UserError("a system message: the models that nanorl trained know none")
                pieces = [("<|bos|>", "")]
                for role, text in turns:
                    pieces += [(f"<|{role}|>", text)] + [("<|end|>", "")] * (role == "assistant")
                return [*pieces, ("<|assistant|>", "")]
            case "chatml":
                pieces = []
                for role, text in turns:
                    if self.forget_thoughts and role == "assistant":
                        text = text.split("</think>")[-1].lstrip("\n")
                    pieces += [("<|im_start|>", f"{role}\n{text}"), ("<|im_end|>", "\n")]
                return [*pieces, ("<|im_start|>", "assistant\n")]
            case "llama3":
                pieces, dates = [("<|begin_of_text|>", "")], LLAMA_DATES if self.dates else ""
                for role, text in turns:
                    pieces += [("<|start_header_id|>", role), ("<|end_header_id|>", f"\n\n{dates}{text.strip()}"),
                               ("<|eot_id|>", "")]
                    dates = ""
                return [*pieces, ("<|start_header_id|>", "assistant"), ("<|end_header_id|>", "\n\n")]

    def jinja(self) -> str | None:
        """The chat template that makes transformers render the same; None of the family "plain"."""
        def quoted(text: str) -> str:
            return "'" + text.replace("\\", "\\\\").replace("\n", "\\n") + "'"

        before, turn, text = "", "", "message['content']"
        match self.family:
            case "plain":
                return None
            case "nanorl":
                before = "{{ '<|bos|>' }}"
                turn = f"'<|' + message['role'] + '|>' + {text} + ('<|end|>' if message['role'] == 'assistant' else '')"
            case "chatml":
                default = quoted(f"<|im_start|>system\n{self.system}<|im_end|>\n")
                if self.forget_thoughts:
                    text = (f"({text}.split('</think>')[-1].lstrip('\\n') if message['role'] == 'assistant' and not loop.last "
                            f"else {text})")
                turn = f"'<|im_start|>' + message['role'] + '\\n' + {text} + '<|im_end|>\\n'"
            case "llama3":
                before, dates = "{{ '<|begin_of_text|>' }}", quoted(LLAMA_DATES if self.dates else "")
                default = quoted("<|start_header_id|>system<|end_header_id|>\n\n" + LLAMA_DATES * self.dates + self.system
                                 + "<|eot_id|>")
                turn = (f"'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + ({dates} if loop.first and "
                        f"message['role'] == 'system' else '') + {text} | trim + '<|eot_id|>'")
        if self.system or self.dates:
            before += f"{{% if messages[0]['role'] != 'system' %}}{{{{ {default} }}}}{{% endif %}}"
        begins = quoted(FAMILIES[self.family][0])
        return (f"{before}{{% for message in messages %}}{{{{ {turn} }}}}{{% endfor %}}"
                f"{{% if add_generation_prompt %}}{{{{ {begins} }}}}{{% endif %}}")


def recognise(jinja: str | None, special: dict[str, int], start: str) -> Template:
    """The template that a Jinja program stands for, or "plain" where there is none; UserError where nanorl knows none like it.

    special: the tokenizer's special tokens; start: the one that it puts before every text, or "".
    """
    if jinja is None:
        return Template("plain", start=start)
    text = jinja.replace("\\n", "\n")
    for family, (begins, end) in FAMILIES.items():
        tokens = {end, *re.findall(r"<\|\w+\|>", begins)}
        if (f"{begins}'" in text or f'{begins}"' in text) and tokens <= special.keys():
            dates = "Cutting Knowledge Date" in text
            # A default system message follows its header inside one string; else the string ends at the header.
            default = re.search(r"<\|im_start\|>system\n([^'\"].*?)<\||system<\|end_header_id\|>\n\n([^'\"].*?)<\|", text, re.S)
            system = "" if dates or not default else (default[1] or default[2]).replace("\\\\", "\\")
            if not re.search("['\"]", system):
                return Template(family, system, dates, "</think>" in text, start)
    raise UserError("its chat template is none that nanorl knows; expected ChatML's or Llama 3's, as Qwen, SmolLM2 and "
                    "Llama have it, or none, as base models have")
