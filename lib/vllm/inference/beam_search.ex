defmodule VLLM.BeamSearch do
  @moduledoc false
  # Beam searches; see vllm_bridge/beam_search.py.

  alias VLLM.{BeamSearchOutput, BeamSearchParams, Error, Inference, Options, Prompt}

  @doc "See `VLLM.beam_search/3`."
  @spec search(VLLM.engine(), VLLM.prompt() | [VLLM.prompt()], keyword() | map()) ::
          {:ok, [BeamSearchOutput.t()]} | {:error, Error.t()}
  def search(engine, prompts, options) do
    with {:ok, call, params, _known} <-
           Inference.prepare(
             options,
             Options.beam_search(),
             :beam_search_params,
             BeamSearchParams
           ),
         {:ok, prompts} <- Prompt.to_wire(prompts),
         inputs = {"prompt", prompts},
         {:ok, outputs} <- Inference.map(engine, "beam_search", params, inputs, call),
         do: {:ok, Enum.map(outputs, &BeamSearchOutput.from_wire/1)}
  end
end
