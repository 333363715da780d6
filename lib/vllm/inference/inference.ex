defmodule VLLM.Inference do
  @moduledoc false
  # What all calls have in common that vLLM computes something for: their options
  # become the params of requests, one for each prompt or conversation.

  alias VLLM.Engine.Call
  alias VLLM.{Error, Options, Params, Remote}

  # The options that go along with a request.
  @sent [:tokenization_kwargs, :lora_request, :priority] ++
          Options.names(Options.template() ++ Options.answer())

  @typedoc "What a call is to be like, its params on the wire, and its options."
  @type prepared :: {:ok, Call.t(), %{String.t() => term()}, %{atom() => term()}}

  @doc """
  The options of a call that begins now. `name` is the one that parameters of the
  `kind` are given as where they are not given inline.
  """
  @spec prepare(keyword() | map(), [Options.spec()], atom(), Params.kind()) ::
          prepared() | {:error, Error.t()}
  def prepare(options, specs, name, kind) do
    with {:ok, known, inline} <- Options.split(options, specs),
         {:ok, given} <- Params.to_wire(kind, name, known[name], inline, Options.names(specs)) do
      params = known |> sent() |> Map.put(Atom.to_string(name), given)
      {:ok, Call.new(known), timed(params, known.timeout), known}
    end
  end

  @doc "The same of a call that vLLM has nothing to compute for."
  @spec prepare(keyword() | map(), [Options.spec()]) :: prepared() | {:error, Error.t()}
  def prepare(options, specs) do
    with {:ok, known} <- Options.only(options, specs),
         do: {:ok, Call.new(known), sent(known), known}
  end

  defp sent(known) do
    for name <- @sent, (value = known[name]) not in [nil, %{}], into: %{} do
      {Atom.to_string(name), value}
    end
  end

  @doc "Params with the time after which the worker gives up what its caller waits for no more."
  @spec timed(map(), timeout()) :: map()
  def timed(params, :infinity), do: params
  def timed(params, timeout), do: Map.put(params, "timeout", timeout / 1000)

  @doc "What the engine answers to each of `inputs`, which go as the param `name`."
  @spec map(VLLM.engine(), String.t(), map(), {String.t(), [term()]}, Call.t()) ::
          {:ok, [map()]} | {:error, Error.t()}
  def map(engine, method, params, {name, inputs}, call),
    do: Remote.run(engine, {:map, method, Enum.map(inputs, &Map.put(params, name, &1))}, call)
end
