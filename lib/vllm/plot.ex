defmodule VLLM.Plot do
  @moduledoc false
  # Pictures of figures. What is drawn is said here and by whoever has the figures; matplotlib draws it, in
  # a tools worker (python/vllm_bridge/tools/plots.py).

  alias VLLM.{Error, Options, Tools}

  @typedoc """
  Where a value lies, and from where to where it is sure or spread, which all of a series have or none;
  nil is nowhere.
  """
  @type point :: {x :: number(), y :: number()} | {number(), number(), {number(), number()}} | nil

  @typedoc "Panels as the request `plot` has them (guides/protocol.md)."
  @type panel :: %{String.t() => term()}

  @doc """
  The picture of panels, as the bytes of its file. Options are those of `Options.plot/0`.

  Errors are `:vllm_not_installed` where matplotlib is not there, and those of a question to tools.
  """
  @spec draw(String.t(), [panel()], keyword() | map()) :: {:ok, binary()} | {:error, Error.t()}
  def draw(title, panels, options) do
    params = %{"title" => title, "panels" => panels}
    Tools.general("plot", params, options, Options.plot())
  end

  @doc "A panel of values by their names in the legend, `settings` of it over what is usual."
  @spec panel(String.t(), String.t(), [{String.t(), [point()]}], keyword()) :: panel()
  def panel(title, kind, series, settings) do
    for {name, value} <- settings,
        into: %{"title" => title, "kind" => kind, "series" => Enum.map(series, &series/1)},
        do: {Atom.to_string(name), value}
  end

  defp series({label, points}) do
    points = Enum.reject(points, &is_nil/1)
    spread = for {_x, _y, spread} <- points, do: spread

    %{
      "label" => label,
      "x" => Enum.map(points, &elem(&1, 0)),
      "y" => Enum.map(points, &elem(&1, 1)),
      "low" => Enum.map(spread, &elem(&1, 0)),
      "high" => Enum.map(spread, &elem(&1, 1))
    }
  end
end
