defmodule VLLM.Engine.Progress do
  @moduledoc false
  # The phases of loading, from the worker's notifications and from what vLLM's
  # processes log.

  alias VLLM.Hub

  @typedoc "`:download` has the fields of a `VLLM.Hub.Progress`, but for its beginning."
  @type t :: %{
          required(:phase) => phase(),
          optional(:done) => non_neg_integer(),
          optional(:total) => pos_integer(),
          optional(atom()) => number() | nil
        }
  @type phase ::
          :python
          | :hub
          | :download
          | :import
          | :config
          | :quantizing
          | :engine
          | :weights
          | :warmup
          | :ready

  @texts %{
    python: "starting Python",
    hub: "asking the Hugging Face hub",
    download: "downloading",
    import: "importing vLLM",
    config: "reading the model's config",
    quantizing: "quantizing the model",
    engine: "starting the engine",
    weights: "loading weights",
    warmup: "warming up",
    ready: "ready"
  }

  @doc "What a `load_progress` notification says, if this version knows its phase."
  @spec of_wire(map()) :: t() | nil
  def of_wire(%{"phase" => "hub"}), do: %{phase: :hub}
  def of_wire(%{"phase" => "import"}), do: %{phase: :import}
  def of_wire(%{"phase" => "config"}), do: %{phase: :config}
  def of_wire(%{"phase" => "engine"}), do: %{phase: :engine}

  def of_wire(%{"phase" => "download"} = params) do
    case Hub.Progress.from_wire(params) do
      {:ok, progress} -> progress |> Map.from_struct() |> Map.put(:phase, :download)
      :error -> %{phase: :download}
    end
  end

  def of_wire(%{"phase" => "quantizing", "done" => done, "total" => total})
      when is_integer(done) and done >= 0 and is_integer(total) and total > 0,
      do: %{phase: :quantizing, done: done, total: total}

  def of_wire(%{"phase" => "quantizing"}), do: %{phase: :quantizing}
  def of_wire(_newer), do: nil

  @doc """
  Whether `progress` is worth a line in the log after `last`: a download tells of itself several
  times a second.
  """
  @spec notable?(t(), t() | nil) :: boolean()
  def notable?(%{phase: :download, bytes: _} = progress, %{phase: :download, bytes: _} = last),
    do: tenth(progress) != tenth(last)

  def notable?(%{phase: :quantizing, done: _} = progress, %{phase: :quantizing, done: _} = last),
    do: tenth(progress) != tenth(last)

  def notable?(_progress, _last), do: true

  defp tenth(%{phase: :quantizing} = progress), do: div(10 * progress.done, progress.total)
  defp tenth(progress), do: progress |> download() |> Hub.Progress.percent() |> div(10)

  defp download(progress), do: struct(Hub.Progress, progress)

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

  def describe(%{phase: :download, bytes: _} = progress),
    do: "#{@texts.download} #{progress |> download() |> Hub.Progress.describe()}"

  def describe(%{phase: phase}), do: @texts[phase]
end
