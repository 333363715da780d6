defmodule VLLM.StructuredOutputsParams do
  alias VLLM.Fields

  @parameters [
    json: "a JSON schema, as a map or a string",
    regex: "a regular expression for the whole text",
    choice: "a list of texts, one of which it is to be",
    grammar: "a context-free grammar in EBNF or Lark",
    json_object: "true for any JSON object",
    structural_tag: "tags and what is to stand between them, as a JSON string",
    disable_any_whitespace: "no spaces between the parts of JSON (false)",
    disable_additional_properties: "no properties but those of the schema (false)",
    whitespace_pattern: "a regular expression for the spaces between the parts of JSON"
  ]

  @moduledoc """
  What a completion must conform to: vLLM's `StructuredOutputsParams`, by the same names.

  Made by `VLLM.structured_outputs!/1`:

      yes_or_no = VLLM.structured_outputs!(choice: ["yes", "no"])
      VLLM.generate!(llm, "Is water wet?", structured_outputs: yes_or_no)

  One of the first six is given, and any of the others, whose defaults are in parentheses. Names
  are checked at once. Schemas, expressions and grammars are checked by vLLM with the request; a
  wrong one is `:invalid_option` with vLLM's reason.

  #{Fields.docs(@parameters)}

  The text is cut off where `max_tokens` ends it: give it room. A model that was not trained to
  write what is asked of it conforms to the letter and says nothing of use; it may put spaces between
  the parts of JSON until `max_tokens`, unless the engine is started with
  `structured_outputs_config: [backend: "xgrammar", disable_any_whitespace: true]`.
  """

  use VLLM.Params, parameters: @parameters, made_by: "structured_outputs!"
end
