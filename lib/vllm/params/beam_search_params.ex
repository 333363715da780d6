defmodule VLLM.BeamSearchParams do
  alias VLLM.Fields

  @parameters [
    beam_width: "beams to keep, and to return (required)",
    max_tokens: "tokens that a beam may have at most (required)",
    ignore_eos: "go on after the end-of-sequence token (false)",
    temperature:
      "of the choice of tokens; only for engines with `logprobs_mode: \"processed_logprobs\"` (0.0)",
    length_penalty:
      "a beam's score is its log probability by its length to the power of this: over 0 favours long ones, under 0 short ones (1.0)",
    include_stop_str_in_output: "keep the end-of-sequence token among a beam's tokens (false)",
    skip_special_tokens: "leave special tokens out of the text (true)"
  ]

  @moduledoc """
  How beams are searched: vLLM's `BeamSearchParams`, by the same names.

  Made by `VLLM.beam_search_params!/1`, or given inline:

      VLLM.beam_search!(llm, "Once upon a time", beam_width: 4, max_tokens: 32)

  A parameter that is not given has the value `:default`: vLLM's own, in parentheses below. Names
  are checked at once. Values are checked by vLLM with the request; a wrong one is
  `:invalid_option`.

  #{Fields.docs(@parameters)}

  Not among them are two of vLLM's that have no effect on the beam search of a serving engine:
  `structured_outputs` and `watermarking`.
  """

  use VLLM.Params, parameters: @parameters, made_by: "beam_search_params!"
end
