defmodule Mix.Tasks.Vllm.Models do
  @shortdoc "Shows the models that can be served on this machine, names, deletes and uploads them"

  @moduledoc """
  Shows the models that can be served on this machine, those first that were used last: what jobs
  made, folders that were registered, what was quantized in place (`isq`), and what was downloaded from
  the Hugging Face hub.

      mix vllm.models [--json] [--download-dir FOLDER]
      mix vllm.models --register FOLDER --as NAME [--label LABEL] [--replace]
      mix vllm.models --alias MODEL --as NAME [--replace]
      mix vllm.models --delete MODEL [--revision REVISION]
      mix vllm.models --push MODEL --to OWNER/NAME [--public]

  The table has the name, the quantization method and its bits, the size, the mean KL divergence
  from what the model was made of where that was measured, when a file of it was last read or
  written, and where it comes from. `--json` prints all that is known, for programs
  (`VLLM.Models.Model`).

  `--register` gives a name to a folder or a GGUF file, and `--alias` another name to a model, as
  `VLLM.Models.register/3` and `VLLM.Models.alias/3` do. `--delete` removes a model, and says how much
  room that makes: what was made or downloaded with its files, of a registered folder only its name;
  with `--revision` one revision of a model of the hub, with what no other needs. `--download-dir` is for
  models that were downloaded by this option. `--push` uploads a model to the hub, as
  `VLLM.Models.push/3` does, with the token of `HF_TOKEN`.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Table}
  alias VLLM.{Bytes, Hub, Models}

  @requirements ["app.config"]

  # What is done to a model, with the switches that go with it.
  @actions %{
    register: [:as, :label, :replace],
    alias: [:as, :replace],
    delete: [:revision, :download_dir],
    push: [:to, :public]
  }

  @switches [
    json: :boolean,
    register: :string,
    alias: :string,
    delete: :string,
    push: :string,
    to: :string,
    public: :boolean,
    as: :string,
    label: :string,
    replace: :boolean,
    revision: :string,
    download_dir: :string
  ]

  @impl Mix.Task
  def run(argv) do
    case OptionParser.parse(argv, strict: @switches) do
      {options, [], []} ->
        {actions, options} = Keyword.split(options, Map.keys(@actions))
        {flags, options} = Keyword.split(options, [:json])
        act(actions, options, if(flags[:json], do: ["json"], else: []))

      {_options, [word | _], _} ->
        Mix.raise("mix vllm.models takes no argument #{inspect(word)}; see mix help vllm.models")

      {_options, [], [{switch, _value} | _]} ->
        Mix.raise(
          "mix vllm.models takes no #{switch}, or another value; see mix help vllm.models"
        )
    end
  end

  defp act([], options, flags) do
    only!(options, [:download_dir], "without another switch")
    options |> Models.list() |> Answer.ok!() |> Answer.print(flags, &print/1)
  end

  defp act([{action, model}], options, flags) do
    only!(options, @actions[action], "with --#{action}")
    do_to(action, model, options, flags)
  end

  defp act([{one, _}, {other, _} | _], _options, _flags),
    do: Mix.raise("mix vllm.models takes one of --#{one} and --#{other} at a time")

  defp only!(options, known, where) do
    with [name | _] <- Keyword.keys(options) -- known,
         do: Mix.raise("mix vllm.models takes no --#{switch(name)} #{where}")
  end

  defp switch(name), do: name |> Atom.to_string() |> String.replace("_", "-")

  defp do_to(:register, path, options, flags) do
    {name, options} = name!(options, "--register #{path}")
    model = path |> Models.register(name, options) |> Answer.ok!()
    Answer.print(model, flags, &Mix.shell().info("#{&1.path} is called #{&1.name}."))
  end

  defp do_to(:alias, model, options, _flags) do
    {name, options} = name!(options, "--alias #{model}")
    :ok = model |> Models.alias(name, options) |> ok() |> Answer.ok!()
    Mix.shell().info("#{name} is another name of #{model}.")
  end

  defp do_to(:delete, model, options, _flags) do
    freed = model |> delete(options) |> Answer.ok!()
    Mix.shell().info("#{model} is deleted, which makes #{Bytes.file(freed)} free.")
  end

  defp do_to(:push, model, options, _flags) do
    repository =
      options[:to] || Mix.raise("Where to? mix vllm.models --push #{model} --to OWNER/NAME")

    private? = not Keyword.get(options, :public, false)
    url = model |> Models.push(repository, private: private?) |> Answer.ok!()
    Mix.shell().info("#{model} is at #{url}")
  end

  defp delete(model, options) do
    if options[:revision], do: Hub.delete(model, options), else: Models.delete(model, options)
  end

  defp name!(options, where) do
    case Keyword.pop(options, :as) do
      {nil, _options} -> Mix.raise("By which name? mix vllm.models #{where} --as NAME")
      {name, options} -> {name, options}
    end
  end

  defp ok(:ok), do: {:ok, :ok}
  defp ok(error), do: error

  @doc false
  @spec print([Models.Model.t()]) :: :ok
  def print([]) do
    Mix.shell().info(
      "There are none yet; `mix vllm.pull MODEL` downloads one, and `mix vllm.models --register " <>
        "FOLDER --as NAME` names one that is here."
    )
  end

  def print(models) do
    titles = [
      "model",
      "method",
      {:right, "bits"},
      {:right, "size"},
      {:right, "KL"},
      "last used",
      "from"
    ]

    Table.print(titles, Enum.map(models, &row/1))
    total = models |> Enum.map(& &1.size) |> Enum.sum()
    count = if match?([_], models), do: "1 model", else: "#{length(models)} models"
    Mix.shell().info("#{count}, #{Bytes.file(total)}")
  end

  defp row(model) do
    [
      Enum.join([model.name | Enum.map(model.aliases, &"= #{&1}")], " "),
      if(model.kind == :adapter, do: "adapter", else: model.method || "-"),
      bits(model.bits),
      Bytes.file(model.size) <> if(model.incomplete > 0, do: " (incomplete)", else: ""),
      divergence(model.quality),
      if(model.last_used, do: Calendar.strftime(model.last_used, "%Y-%m-%d %H:%M"), else: "-"),
      from(model)
    ]
  end

  defp bits(nil), do: "-"
  defp bits(bits) when bits == trunc(bits), do: Integer.to_string(trunc(bits))
  defp bits(bits), do: Table.decimal(bits, 2)

  defp divergence(%{"kl_mean" => mean}) when is_number(mean), do: Table.decimal(mean, 4)
  defp divergence(_unmeasured), do: "-"

  defp from(%{missing?: true} = model), do: "#{model.path}, which is gone"
  defp from(%{origin: :made} = model), do: "made of #{model.source || model.base_model || "?"}"
  defp from(%{origin: :isq} = model), do: "quantized in place of #{model.source || "?"}"
  defp from(%{origin: :local} = model), do: model.path

  defp from(%{origin: :hub} = model),
    do: "the hub: " <> (model.revisions |> Map.keys() |> Enum.map_join(", ", &short/1))

  # A commit is known by its first digits.
  defp short(revision),
    do: if(revision =~ ~r/\A[0-9a-f]{40}\z/, do: binary_part(revision, 0, 8), else: revision)
end
