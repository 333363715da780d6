defmodule VLLM.PoolingParams do
  alias VLLM.Fields

  @parameters [
    dimensions:
      "shorten vectors to this many numbers; only for models that were trained for it (Matryoshka)",
    use_activation:
      "apply the task's last step: unit length for vectors, softmax or sigmoid for classes (true)",
    step_tag_id: "the token that ends a step, for process reward models",
    returned_token_ids: "the token ids to give scores of, for process reward models",
    skip_reading_prefix_cache:
      "compute the whole prompt again (false; true for the tasks of tokens)",
    extra_kwargs:
      "a map for models and plugins of vLLM; of scores `max_tokens_per_query` and `max_tokens_per_doc`, which cut texts before they are paired"
  ]

  @moduledoc """
  How prompts are pooled: vLLM's `PoolingParams`, by the same names.

  Made by `VLLM.pooling_params!/1`, or given inline:

      VLLM.embed!(llm, "Once upon a time", dimensions: 256)

  A parameter that is not given has the value `:default`: the model's own, else vLLM's, in
  parentheses below. Names are checked at once. Values are checked by vLLM with the request; a
  wrong one is `:invalid_option`.

  #{Fields.docs(@parameters)}

  Not among them are four of vLLM's that are set by the function that is called and by vLLM itself:
  `task`, `requires_token_ids`, `late_interaction_params` and `output_kind`.
  """

  use VLLM.Params, parameters: @parameters, made_by: "pooling_params!"
end
