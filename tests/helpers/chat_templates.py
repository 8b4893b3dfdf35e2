"""Chat templates in the documented formats, and a tokenizer that knows their control tokens.

Written from https://ai.google.dev/gemma/docs/core/prompt-structure (Gemma 3) and
https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4; they render only what the tests use.
"""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from headstart.heads.loading import byte_tokenizer

GEMMA3 = """
{{- bos_token -}}
{%- set system = messages[0].role == 'system' -%}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/...') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' -}}
    {{- messages[0].content + '\\n\\n' if system and loop.first -}}
    {{- message.content | trim -}}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\\n' if add_generation_prompt -}}
"""

GEMMA4 = """
{%- macro strip_thoughts(text) -%}
    {%- for part in text.split('<channel|>') -%}{{- part.split('<|channel>')[0] -}}{%- endfor -%}
{%- endmacro -%}
{%- macro fields(values) -%}
    {%- for key, value in values.items() -%}
        {{- key + ':' -}}
        {{- '<|"|>' + value + '<|"|>' if value is string else value | tojson -}}
        {{- ',' if not loop.last -}}
    {%- endfor -%}
{%- endmacro -%}
{%- macro response(name, values) -%}
    {{- '<|tool_response>response:' + name + '{' + fields(values) + '}<tool_response|>' -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set ns = namespace(asked=0, answered=false, following=true, ended=true) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if enable_thinking or tools or messages[0].role == 'system' -%}
    {{- '<|turn>system\\n' + ('<|think|>\\n' if enable_thinking else '') -}}
    {{- messages[0].content | trim if messages[0].role == 'system' -}}
    {%- for tool in tools or [] -%}
        {{- '<|tool>declaration:' + tool.function.name + '{description:<|"|>' -}}
        {{- tool.function.description + '<|"|>}<tool|>' -}}
    {%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role in ('user', 'assistant') -%}
        {%- set model = message.role == 'assistant' -%}
        {%- if not (model and loop.previtem.role in ('assistant', 'tool')) -%}
            {{- '<|turn>' + ('model' if model else 'user') + '\\n' -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {{- '<|tool_call>call:' + call.function.name + '{' -}}
            {{- fields(call.function.arguments) + '}<tool_call|>' -}}
        {%- endfor -%}
        {%- set ns.answered = false -%}
        {%- for tool in message.tool_responses or [] -%}
            {{- response(tool.name, tool.response) -}}
            {%- set ns.answered = true -%}
        {%- endfor -%}
        {%- set ns.following = true if message.tool_calls else false -%}
        {%- for later in messages[loop.index:] -%}
            {%- set ns.following = ns.following and later.role == 'tool' -%}
            {%- if ns.following -%}
                {{- response(later.name, {'value': later.content}) -}}
                {%- set ns.answered = true -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set old = model and loop.index0 < ns.asked -%}
        {%- set content = (strip_thoughts(message.content) if old else message.content) | trim -%}
        {%- set ns.ended = not ns.answered if not content else true -%}
        {{- content -}}
        {%- if message.tool_calls and not ns.answered -%}
            {{- '<|tool_response>' -}}
        {%- elif ns.ended -%}
            {{- '<turn|>\\n' -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.ended -%}
    {{- '<|turn>model\\n' + ('' if enable_thinking else '<|channel>thought\\n<channel|>') -}}
{%- endif -%}
"""

CHATML = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""

STOPS = {
    GEMMA3: ["<eos>", "<end_of_turn>"],
    GEMMA4: ["<eos>", "<turn|>", "<|tool_response>"],
    CHATML: ["<|im_end|>"],
}

CONTROL_TOKENS = [
    "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|turn>", "<turn|>",
    "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", '<|"|>',
]  # fmt: skip


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """`byte_tokenizer` with control tokens, and two newlines merged into one token."""
    plain = byte_tokenizer()
    state = json.loads(plain.backend_tokenizer.to_str())
    newline = "Ċ"  # the byte 10, as byte-level vocabularies write it
    state["model"]["vocab"][newline * 2] = len(state["model"]["vocab"])
    state["model"]["merges"] = [[newline, newline]]
    state["pre_tokenizer"]["use_regex"] = False  # else words are split before they can merge
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **plain.special_tokens_map
    )
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL_TOKENS})
    tokenizer.chat_template = template
    return tokenizer
