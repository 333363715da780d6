defmodule VLLM.AllowedModels do
  @moduledoc false
  # Which models may be named where users of an application name them: by the
  # option `allowed_models:` and the application environment of that name. Asked
  # before anything is looked up, here or on the hub.

  alias VLLM.{Error, Options}

  @typedoc "A name, or a pattern in which `*` stands for anything, or a regular expression."
  @type pattern :: String.t() | Regex.t()

  @doc "Whether `model` may be used: both lists must have it, where there are two."
  @spec check(String.t(), [pattern()] | nil) :: :ok | {:error, Error.t()}
  def check(model, patterns) do
    with {:ok, configured} <- configured(),
         names = [patterns, configured] |> Enum.reject(&is_nil/1),
         true <- names == [] or Enum.all?(names, &fits_any?(full(model), &1)) do
      :ok
    else
      false -> {:error, refusal(model)}
      {:error, error} -> {:error, error}
    end
  end

  defp configured do
    case Application.get_env(:ex_vllm, :allowed_models) do
      nil -> {:ok, nil}
      patterns -> Options.check(:patterns, :allowed_models, patterns)
    end
  end

  # What the name stands for, if that is a path; else one could lead out of an allowed folder.
  defp full(model) do
    if String.starts_with?(model, "/") or ".." in Path.split(model),
      do: Path.expand(model),
      else: Options.expand(model)
  end

  @doc "Whether a name fits one of the patterns."
  @spec fits_any?(String.t(), [pattern()]) :: boolean()
  def fits_any?(model, patterns), do: Enum.any?(patterns, &fits?(&1, model))

  defp fits?(%Regex{} = pattern, model), do: Regex.match?(pattern, model)

  defp fits?(pattern, model) do
    pattern =
      if String.starts_with?(pattern, ["./", "~"]), do: Path.expand(pattern), else: pattern

    parts = pattern |> String.split("*") |> Enum.map_join(".*", &Regex.escape/1)
    Regex.match?(Regex.compile!("\\A#{parts}\\z", "s"), model)
  end

  defp refusal(model) do
    Error.new(
      :not_allowed,
      "`#{model}` is not among the models that `allowed_models` allows here. Name one of those, or " <>
        "have this one added to the list.",
      %{"model" => model}
    )
  end
end
