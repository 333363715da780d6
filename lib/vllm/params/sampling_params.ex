defmodule VLLM.SamplingParams do
  alias VLLM.Fields

  @parameters [
    n: "completions to make for each prompt (vLLM's default 1)",
    temperature: "randomness; 0 is greedy: always the likeliest token (1.0)",
    top_p:
      "sample from the likeliest tokens that make up this share of the probability, over 0 to 1 (1.0)",
    top_k: "sample from this many of the likeliest tokens; 0 for all (0)",
    min_p:
      "leave out tokens with less than this share of the likeliest one's probability, 0 to 1 (0.0)",
    max_tokens: "tokens to make at most; nil for as many as the context holds (16)",
    min_tokens: "tokens to make before an end or a `stop_token_ids` counts (0)",
    seed: "of the random choices, for answers that can be repeated",
    stop: "a string, or a list of them, that ends the completion; not part of its text",
    stop_token_ids: "token ids that end the completion",
    include_stop_str_in_output: "keep the stop string in the text (false)",
    ignore_eos: "go on after the end-of-sequence token (false)",
    bad_words: "words that are not to come up",
    logit_bias: "a map from token ids to what is added to their logits, -100 to 100",
    allowed_token_ids: "the only token ids that may come up",
    presence_penalty: "over 0 disfavours tokens that the completion has already, -2 to 2 (0.0)",
    frequency_penalty: "the same, by how often it has them, -2 to 2 (0.0)",
    repetition_penalty: "over 1 disfavours tokens of prompt and completion (1.0)",
    logprobs:
      "log probabilities of this many likeliest tokens at each place, and of the chosen one; -1 for all",
    prompt_logprobs: "the same for the tokens of the prompt",
    logprob_token_ids: "the token ids to give log probabilities of, instead of the likeliest",
    prompt_logprob_token_ids: "lists of token ids to score, a list for each place of the prompt",
    prompt_logprob_start: "the first place of the prompt to score (0)",
    structured_outputs:
      "what the completion must conform to, as a map: one of `json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag`",
    detokenize: "turn the tokens into text (true)",
    skip_special_tokens: "leave special tokens out of the text (true)",
    spaces_between_special_tokens: "put spaces between those that are not left out (true)",
    stream_interval: "tokens that one step of a stream brings at least",
    thinking_token_budget: "tokens that a reasoning model may think; -1 for any number",
    repetition_detection:
      "a map (`max_pattern_size`, `min_pattern_size`, `min_count`): ends completions that go in circles",
    skip_reading_prefix_cache:
      "compute the whole prompt again (false; true with `prompt_logprobs`)",
    watermarking: "mark the text with the engine's watermark, if it has one (true)",
    extra_args: "a map for plugins of vLLM",
    routed_experts_prompt_start: "tokens of the prompt that returned routing data leaves out (0)",
    trace_decode_token_ids: "token ids to emit instead of sampling, for debugging"
  ]

  @moduledoc """
  How completions are sampled: vLLM's `SamplingParams`, by the same names.

  Made by `VLLM.sampling_params!/1`, or given inline:

      VLLM.generate!(llm, "Once upon a time", temperature: 0.8, max_tokens: 64)

  A parameter that is not given has the value `:default`: the model's own (its
  `generation_config.json`), else vLLM's, in parentheses below. Names are
  checked at once. Values are checked by vLLM with the request; a wrong one is
  `:invalid_option`.

  #{Fields.docs(@parameters)}

  Not among them are four of vLLM's that this library sets itself: `output_kind`, `skip_clone`,
  `output_text_buffer_length` and `flat_logprobs` say how vLLM hands results over inside Python.
  """

  # Of what completions conform to, people remember the name and not the place.
  @structured_outputs (for name <- Map.keys(VLLM.StructuredOutputsParams.fields()), into: %{} do
                         also =
                           if name == "json",
                             do: ", or as `schema:`, which gives the parsed value too",
                             else: ""

                         {name, "It is given as `structured_outputs: [#{name}: …]`#{also}."}
                       end)

  use VLLM.Params,
    parameters: @parameters,
    made_by: "sampling_params!",
    elsewhere: @structured_outputs
end
