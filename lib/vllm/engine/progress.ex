defmodule VLLM.Engine.Progress do
  @moduledoc false
  # The phases of loading, from the worker's notifications and from what vLLM's
  # processes log.

  alias VLLM.Engine.Config

  @type t :: %{
          required(:phase) => phase(),
          optional(:done) => pos_integer(),
          optional(:total) => pos_integer()
        }
  @type phase :: :python | :hub | :import | :config | :engine | :weights | :warmup | :ready

  @texts %{
    python: "starting Python",
    hub: "asking the Hugging Face hub",
    import: "importing vLLM",
    config: "reading the model's config",
    engine: "starting the engine",
    weights: "loading weights",
    warmup: "warming up",
    ready: "ready"
  }

  @doc "The phase of that name in a `load_progress` notification."
  @spec phase(term()) :: phase() | nil
  def phase("hub"), do: :hub
  def phase("import"), do: :import
  def phase("config"), do: :config
  def phase("engine"), do: :engine
  def phase(_), do: nil

  @doc """
  What a line of the log says about loading, if anything.

  vLLM's processes tell it in no other way: the weights are read by a child of
  a child.
  """
  @spec of_line(String.t()) :: t() | nil
  def of_line(line) do
    cond do
      match = Regex.run(~r/Loading .*checkpoint shards:.*\| (\d+)\/(\d+)/, line) ->
        [_, done, total] = match
        %{phase: :weights, done: String.to_integer(done), total: String.to_integer(total)}

      line =~ "Starting to load model" ->
        %{phase: :weights}

      line =~ ~r/Warming up|Capturing CUDA graph|Dynamo bytecode transform/ ->
        %{phase: :warmup}

      true ->
        nil
    end
  end

  @doc "A phase in words."
  @spec describe(t()) :: String.t()
  def describe(%{phase: phase, done: done, total: total}),
    do: "#{@texts[phase]} (#{done} of #{total})"

  def describe(%{phase: phase}), do: @texts[phase]

  @doc """
  A function that shows progress on the terminal of the calling process: a line
  that overwrites itself. Unless told so or not, it does in iex and in mix tasks
  that have a terminal.
  """
  @spec printer(Config.t()) :: (t() -> :ok)
  def printer(config) do
    shown = config.options.progress
    shown = if is_nil(shown), do: terminal?() and interactive?(), else: shown
    name = Config.display_name(config)
    if shown, do: &print(name, &1), else: fn _ -> :ok end
  end

  defp terminal?, do: match?({:ok, _columns}, :io.columns())

  defp interactive? do
    Enum.any?(Application.started_applications(), fn {app, _, _} -> app in [:iex, :mix] end)
  end

  defp print(name, progress) do
    last = if progress.phase == :ready, do: "\n", else: ""
    # Back to the start of the line, and clear it.
    IO.write("\r\e[K#{name}: #{describe(progress)}#{last}")
  end
end
