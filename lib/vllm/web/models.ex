defmodule VLLM.Web.Models do
  @moduledoc false
  # Models over HTTP: those of this machine, and what there is to know of any.

  alias VLLM.{Models, Quantization}
  alias VLLM.Web.{Given, Heavy}

  @doc "Whether one would run."
  def check(asked), do: question(asked, &Quantization.check/2)

  @doc "How much memory it would take."
  def estimate(asked) do
    with {:ok, estimate} <- question(asked, &Quantization.estimate/2) do
      parts =
        for name <- [:weights, :adapters, :draft, :activations, :framework, :kv_cache, :left],
            do: part(name, estimate)

      available = sum(estimate, :budget)

      {:ok,
       estimate |> Map.from_struct() |> Map.merge(%{parts: parts, available_bytes: available})}
    end
  end

  defp part(name, estimate), do: %{name: name, bytes: sum(estimate, name)}
  defp sum(estimate, name), do: estimate.devices |> Enum.map(&(&1[name] || 0)) |> Enum.sum()

  defp question(asked, ask) do
    Heavy.run(asked, fn ->
      with {:ok, options} <- Given.options(asked.body), do: ask.(asked.body["model"], options)
    end)
  end

  @doc "What models lost that were made of another."
  def compare(asked) do
    Heavy.run(asked, fn ->
      with {:ok, options} <- Given.options(asked.body),
           {:ok, comparison} <- Quantization.compare(asked.body["models"], options),
           do: {:ok, Map.from_struct(comparison)}
    end)
  end

  @doc "The models of this machine."
  def list(asked) do
    Heavy.run(asked, fn ->
      with {:ok, models} <- Models.list(), do: {:ok, %{models: Enum.map(models, &view/1)}}
    end)
  end

  defp view(model) do
    %{
      name: model.name,
      path: model.path,
      format: model.method || "plain",
      type: model.label,
      bytes: model.size,
      created_at: model.registered_at,
      job: model.made["job"],
      kind: model.kind,
      origin: model.origin,
      aliases: model.aliases,
      bits: model.bits,
      source: model.source,
      base_model: model.base_model,
      missing: model.missing?,
      quality: model.quality,
      last_used: model.last_used
    }
  end

  @doc "Deletes one."
  def delete(asked) do
    Heavy.run(asked, fn ->
      with {:ok, bytes} <- Models.delete(asked.params["name"]), do: {:ok, %{freed_bytes: bytes}}
    end)
  end
end
