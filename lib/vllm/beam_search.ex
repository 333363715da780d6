defmodule VLLM.BeamSearch do
  @moduledoc false
  # Beam searches; see `VLLM.beam_search/3` and vllm_bridge/beam_search.py.

  alias VLLM.{BeamSearchOutput, BeamSearchParams, Error, LoRARequest, Options, Params, Prompt}
  alias VLLM.Engine.{Call, Router, Table}

  @options Options.request() ++
             [
               {:beam_search_params, :any, nil,
                "a `VLLM.BeamSearchParams`, a keyword list or a map; parameters given inline override it"},
               {:lora_request, :lora_request, nil,
                "the adapter to apply, from `VLLM.lora_request!/3`; the engine needs `enable_lora: true`"}
             ]

  @spec options() :: [Options.spec()]
  def options, do: @options

  @spec search(VLLM.engine(), VLLM.prompt() | [VLLM.prompt()], keyword() | map()) ::
          {:ok, [BeamSearchOutput.t()]} | {:error, Error.t()}
  def search(engine, prompts, options) do
    with {:ok, call, params} <- params(options),
         call = Call.new(call),
         {:ok, prompts} <- Prompt.to_wire(prompts),
         {:ok, table, _pid} <- Table.lookup(engine),
         requests = Enum.map(prompts, &Map.put(params, "prompt", &1)),
         {:ok, outputs} <- Router.map(table, "beam_search", requests, call) do
      {:ok, Enum.map(outputs, &BeamSearchOutput.from_wire/1)}
    end
  end

  # The options of a call, and what they make of its params on the wire.
  defp params(options) do
    with {:ok, call, inline} <- Options.split(options, @options),
         {:ok, beams} <- BeamSearchParams.new(call.beam_search_params || []),
         {:ok, beams} <- Params.put(beams, inline, Enum.map(@options, &elem(&1, 0))) do
      lora = call.lora_request

      given = [
        {"beam_search_params", Params.to_wire(beams)},
        {"lora_request", lora && LoRARequest.to_wire(lora)},
        {"timeout", if(call.timeout != :infinity, do: call.timeout / 1000)}
      ]

      {:ok, call, for({name, value} <- given, value != nil, into: %{}, do: {name, value})}
    end
  end
end
