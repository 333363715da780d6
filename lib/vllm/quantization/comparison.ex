defmodule VLLM.Quantization.Comparison do
  @moduledoc """
  What models have lost to a reference, from `VLLM.Quantization.compare/2`.

    * `:reference` - the model that the others were compared with
    * `:texts` - `:held_out` for the texts that ship with this library, `:given` for others
    * `:rows` - a `VLLM.Quantization.Comparison.Row` for each model, in their order

  It is a text, too: `to_string/1` and `IO.puts/1` make a table of it, `to_json/1` has all of its
  figures, and `plot/2` draws quality over size.
  """

  import VLLM.Error, only: [bang!: 1]

  alias Mix.Vllm.Table
  alias VLLM.{Bytes, Error, JSON, Options}
  alias VLLM.Quantization.Comparison.{Plot, Row}

  @enforce_keys [:reference, :texts, :rows]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          reference: String.t(),
          texts: :held_out | :given,
          rows: [Row.t()]
        }

  @doc false
  @spec new(String.t(), [String.t()] | nil, [Row.t()]) :: t()
  def new(reference, texts, rows) do
    %__MODULE__{reference: reference, texts: if(texts, do: :given, else: :held_out), rows: rows}
  end

  @doc "All of it as JSON text."
  @spec to_json(t()) :: String.t()
  def to_json(%__MODULE__{} = comparison), do: JSON.encode(comparison)

  @doc """
  A picture of it, as the content of its file: mean KL divergence from the reference, on a logarithmic scale,
  over the bytes of the weights, where it is known and not 0; and sizes, how often both hold the same token
  for the likeliest, and tokens/s side by side.

      File.write!("quality.svg", VLLM.Quantization.Comparison.plot!(comparison))

  ## Options

  #{Options.docs(Options.plot())}

  The error is `:vllm_not_installed` where matplotlib is missing (`mix vllm.setup --with matplotlib`).
  """
  @spec plot(t(), keyword() | map()) :: {:ok, binary()} | {:error, Error.t()}
  def plot(%__MODULE__{} = comparison, options \\ []) do
    title = "What was lost of #{comparison.reference}"
    VLLM.Plot.draw(title, Plot.panels(comparison.rows), options)
  end

  @doc "Like `plot/2`, but returns the picture or raises `VLLM.Error`."
  @spec plot!(t(), keyword() | map()) :: binary()
  def plot!(comparison, options \\ []), do: bang!(plot(comparison, options))

  @doc false
  @spec lines(t()) :: [IO.ANSI.ansidata()]
  def lines(%__MODULE__{} = comparison) do
    Table.lines(
      [
        "model",
        "format",
        {:right, "size"},
        {:right, "bits"},
        {:right, "perplexity"},
        {:right, "KL"},
        {:right, "KL 99 %"},
        {:right, "same top"},
        {:right, "tokens/s"},
        "verdict"
      ],
      Enum.map(comparison.rows, &row(&1, comparison.reference))
    ) ++ notes(comparison)
  end

  defp row(%{error: nil} = row, reference) do
    [
      row.model,
      row.format,
      Bytes.file(row.bytes),
      number(row.bits_per_weight, 2),
      number(row.perplexity, 3),
      number(row.kl_mean, 5),
      number(row.kl_p99, 4),
      if(row.same_top, do: "#{Table.decimal(100 * row.same_top, 1)} %", else: "?"),
      number(row.tokens_per_second, 1),
      verdict(row, reference)
    ]
  end

  defp row(row, _reference) do
    [row.model, "?", "?", "?", "?", "?", "?", "?", "?", {:red, Atom.to_string(row.error.reason)}]
  end

  defp verdict(%{verdict: :ok}, _reference), do: {:green, "ok"}
  defp verdict(%{verdict: :worse_than_usual}, _reference), do: {:red, "worse than usual"}
  defp verdict(%{verdict: :broken}, _reference), do: {:red, "broken"}
  defp verdict(%{model: model}, model), do: "reference"
  defp verdict(_row, _reference), do: ""

  defp number(nil, _decimals), do: "?"
  defp number(number, _decimals) when number >= 1.0e15, do: "huge"
  defp number(number, decimals), do: Table.decimal(number, decimals)

  defp notes(comparison) do
    for %{says: [_ | _]} = row <- comparison.rows,
        line <- ["", [:bright, row.model, :reset] | Enum.flat_map(row.says, &hanging/1)],
        do: line
  end

  defp hanging(text), do: for(line <- Table.wrap(text), do: "  " <> line)

  defimpl String.Chars do
    def to_string(comparison),
      do: comparison |> VLLM.Quantization.Comparison.lines() |> Mix.Vllm.Table.plain()
  end

  defimpl Inspect do
    def inspect(comparison, _opts), do: "#VLLM.Quantization.Comparison<\n#{comparison}\n>"
  end
end
