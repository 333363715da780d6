defmodule VLLM.Admin do
  @moduledoc false
  # What an engine is asked or told besides its work: whether it is ready, what it is, its replicas,
  # its end; and every worker of it: health, metrics, caches, sleep.

  alias VLLM.Engine.Call
  alias VLLM.{EngineInfo, Error, Options, Remote}

  @doc "See `VLLM.await_ready/2`."
  @spec await_ready(VLLM.engine(), timeout()) :: :ok | {:error, Error.t()}
  def await_ready(engine, timeout) do
    with :ok <- Options.check_timeout(timeout),
         do: Remote.run(engine, :await_ready, Call.new(%{timeout: timeout}))
  end

  @doc "See `VLLM.engine_info/2`."
  @spec info(VLLM.engine(), timeout()) :: {:ok, EngineInfo.t()} | {:error, Error.t()}
  def info(engine, timeout) do
    with :ok <- Options.check_timeout(timeout),
         {:ok, info} <- Remote.run(engine, :info, Call.new(%{timeout: timeout})),
         do: {:ok, EngineInfo.from_wire(info)}
  end

  @doc "Tells every worker of the engine something; `specs` are the options that go along."
  @spec tell(VLLM.engine(), String.t(), keyword() | map(), [Options.spec()]) ::
          :ok | {:error, Error.t()}
  def tell(engine, method, options, specs \\ Options.call()) do
    with {:ok, _} <- each(engine, method, options, specs), do: :ok
  end

  @doc "See `VLLM.metrics/2`."
  @spec metrics(VLLM.engine(), keyword() | map()) :: {:ok, figures} | {:error, Error.t()}
        when figures: %{String.t() => number() | %{String.t() => number()}}
  def metrics(engine, options) do
    with {:ok, figures} <- each(engine, "metrics", options, Options.call()),
         do: {:ok, merge(figures)}
  end

  defp each(engine, method, options, specs) do
    with {:ok, opts} <- Options.only(options, specs) do
      params =
        Map.new(Map.delete(opts, :timeout), fn {name, value} -> {Atom.to_string(name), value} end)

      Remote.run(engine, {:each, method, params}, Call.new(opts))
    end
  end

  # Of several workers, shares are averaged, and all else is added up.
  defp merge(figures) do
    count = length(figures)

    figures
    |> Enum.reduce(fn one, all -> Map.merge(all, one, fn _name, a, b -> add(a, b) end) end)
    |> Map.new(fn {name, value} ->
      {name, if(String.ends_with?(name, "_perc"), do: value / count, else: value)}
    end)
  end

  defp add(a, b) when is_map(a), do: Map.merge(a, b, fn _, x, y -> x + y end)
  defp add(a, b), do: a + b
end
