defmodule VLLM.Metrics.Exposition do
  @moduledoc false
  # Prometheus' text format, version 0.0.4: pure, and the only place that escapes.

  @typedoc "All series of one metric; a sample has the name of the metric, or of a part of a histogram."
  @type family :: %{name: String.t(), type: String.t(), help: String.t(), samples: [sample()]}
  @type sample :: {String.t(), labels(), number() | :nan | :infinity | :neg_infinity}
  @type labels :: [{String.t(), String.t()}]

  @doc """
  The text of these metrics.

      iex> samples = [{"jobs", [{"kind", ~s(a "b")}], 2}]
      iex> VLLM.Metrics.Exposition.text([%{name: "jobs", type: "gauge", help: "Jobs.", samples: samples}])
      ~S'''
      # HELP jobs Jobs.
      # TYPE jobs gauge
      jobs{kind="a \\"b\\""} 2
      '''
  """
  @spec text([family()]) :: String.t()
  def text(families), do: families |> Enum.map(&family/1) |> IO.iodata_to_binary()

  @doc "One family for each name, with the series of all that have it: a metric stands in one piece."
  @spec merge([family()]) :: [family()]
  def merge(families) do
    alike = Enum.group_by(families, & &1.name)

    for %{name: name} = first <- Enum.uniq_by(families, & &1.name),
        do: %{first | samples: Enum.flat_map(alike[name], & &1.samples)}
  end

  defp family(%{name: name, type: type, help: help, samples: samples}) do
    help = escape(help, ["\\", "\n"])

    [
      ["# HELP ", name, " ", help, "\n# TYPE ", name, " ", type, "\n"]
      | Enum.map(samples, &sample/1)
    ]
  end

  defp sample({name, [], value}), do: [name, " ", number(value), "\n"]

  defp sample({name, labels, value}) do
    labels =
      Enum.map_intersperse(labels, ",", fn {name, value} -> [name, "=\"", label(value), "\""] end)

    [name, "{", labels, "} ", number(value), "\n"]
  end

  defp label(value), do: escape(value, ["\\", "\n", "\""])

  defp escape(text, characters) do
    String.replace(text, characters, fn
      "\n" -> "\\n"
      character -> "\\" <> character
    end)
  end

  defp number(:nan), do: "NaN"
  defp number(:infinity), do: "+Inf"
  defp number(:neg_infinity), do: "-Inf"
  defp number(value), do: to_string(value)
end
