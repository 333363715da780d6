defmodule Mix.Tasks.Vllm.Models do
  @shortdoc "Shows the models of the Hugging Face hub that are on this machine"

  @moduledoc """
  Shows the models of the Hugging Face hub that are on this machine, those first that were used
  last: name, revisions, quantization method, size, and when a file of it was last read or written.

      mix vllm.models [--json] [--download-dir FOLDER]
      mix vllm.models --delete MODEL [--revision REVISION]

  `--json` prints the same for programs (`VLLM.Hub.Model`). `--delete` removes a model, or one
  revision of it with what no other needs, and says how much room that makes. `--download-dir` is
  for those that were downloaded by this option.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Table}
  alias VLLM.{Bytes, Hub}

  @requirements ["app.config"]

  @switches [json: :boolean, delete: :string, revision: :string, download_dir: :string]

  @impl Mix.Task
  def run(argv) do
    case OptionParser.parse(argv, strict: @switches) do
      {options, [], []} ->
        {flags, options} = Keyword.split(options, [:json, :delete])
        run(flags[:delete], if(flags[:json], do: ["json"], else: []), options)

      {_options, [word | _], _} ->
        Mix.raise("mix vllm.models takes no argument #{inspect(word)}; see mix help vllm.models")

      {_options, [], [{switch, _value} | _]} ->
        Mix.raise(
          "mix vllm.models takes no #{switch}, or another value; see mix help vllm.models"
        )
    end
  end

  defp run(nil, flags, options),
    do: options |> Hub.list() |> Answer.ok!() |> Answer.print(flags, &print/1)

  defp run(model, _flags, options) do
    freed = model |> Hub.delete(options) |> Answer.ok!()
    Mix.shell().info("#{model} is deleted, which makes #{Bytes.file(freed)} free.")
  end

  @doc false
  @spec print([Hub.Model.t()]) :: :ok
  def print([]), do: Mix.shell().info("There are none yet; `mix vllm.pull MODEL` downloads one.")

  def print(models) do
    rows = for model <- models, do: row(model)
    Table.print(["model", "revision", "method", {:right, "size"}, "last used"], rows)
    total = models |> Enum.map(& &1.size) |> Enum.sum()
    count = if match?([_], models), do: "1 model", else: "#{length(models)} models"
    Mix.shell().info("#{count}, #{Bytes.file(total)}")
  end

  defp row(model) do
    [
      model.id,
      model.revisions |> Map.keys() |> Enum.map_join(", ", &short/1),
      model.method || "-",
      Bytes.file(model.size) <> if(model.incomplete > 0, do: " (incomplete)", else: ""),
      Calendar.strftime(model.last_used, "%Y-%m-%d %H:%M")
    ]
  end

  # A commit is known by its first digits.
  defp short(revision),
    do: if(revision =~ ~r/\A[0-9a-f]{40}\z/, do: binary_part(revision, 0, 8), else: revision)
end
