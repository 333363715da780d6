defmodule Mix.Vllm.Table do
  @moduledoc false
  # What the tasks print: tables whose columns are as wide as what is in them,
  # and numbers as people read them.

  @typedoc "A text, or one in a colour of `IO.ANSI`."
  @type cell :: String.t() | {atom(), String.t()}

  @typedoc "The title of a column; numbers stand to the right."
  @type column :: String.t() | {:right, String.t()}

  @gap "  "

  # How wide lines are, and the last column of a table at least.
  @width 110
  @last 30

  @doc "Prints a table by `Mix.shell/0`, a line for each row; nothing where there are no rows."
  @spec print([column()], [[cell()]]) :: :ok
  def print(columns, rows), do: columns |> lines(rows) |> Enum.each(&Mix.shell().info/1)

  @doc "The lines of a table, as `IO.ANSI.format/1` takes them. A long last column is wrapped."
  @spec lines([column()], [[cell()]]) :: [IO.ANSI.ansidata()]
  def lines(_columns, []), do: []

  def lines(columns, rows) do
    titles = for column <- columns, do: {:bright, title(column)}
    all = wrapped([titles | rows])
    widths = all |> Enum.zip_with(& &1) |> Enum.map(&widest/1)
    for row <- all, do: line(row, columns, widths)
  end

  defp wrapped(rows) do
    others =
      rows |> Enum.map(&Enum.drop(&1, -1)) |> Enum.zip_with(&(widest(&1) + 2)) |> Enum.sum()

    Enum.flat_map(rows, &wrapped(&1, max(@width - others, @last)))
  end

  defp wrapped(row, width) do
    {others, [last]} = Enum.split(row, -1)
    [first | more] = wrap(text(last), width)

    [
      others ++ [like(last, first)]
      | for(line <- more, do: Enum.map(others, &like(&1, "")) ++ [like(last, line)])
    ]
  end

  defp like({colour, _text}, text), do: {colour, text}
  defp like(_text, text), do: text

  @doc """
  Lines as one text without colours.

      iex> Mix.Vllm.Table.plain(Mix.Vllm.Table.lines(["name", {:right, "size"}], [["a", "10"]]))
      "name  size\\na       10"
  """
  @spec plain([IO.ANSI.ansidata()]) :: String.t()
  def plain(lines),
    do: Enum.map_join(lines, "\n", &(&1 |> IO.ANSI.format(false) |> IO.iodata_to_binary()))

  @doc """
  A text in lines of so many characters at most, where its words are not longer.

      iex> Mix.Vllm.Table.wrap("one two three", 8)
      ["one two", "three"]
  """
  @spec wrap(String.t(), pos_integer()) :: [String.t(), ...]
  def wrap(text, width \\ @width) do
    case String.split(text, " ") do
      [only] -> [only]
      [first | words] -> words |> Enum.reduce([first], &add(&1, &2, width)) |> Enum.reverse()
    end
  end

  defp add(word, [line | lines], width) do
    if String.length(line) + 1 + String.length(word) > width,
      do: [word, line | lines],
      else: [line <> " " <> word | lines]
  end

  # No spaces follow the last text of a line.
  defp line(row, columns, widths) do
    [row, columns, widths]
    |> Enum.zip()
    |> Enum.reverse()
    |> Enum.drop_while(fn {cell, _column, _width} -> text(cell) == "" end)
    |> Enum.with_index(fn {cell, column, width}, index ->
      coloured(cell, pad(text(cell), column, if(index == 0, do: 0, else: width), width))
    end)
    |> Enum.reverse()
    |> Enum.intersperse(@gap)
  end

  defp pad(text, {:right, _title}, _width, full), do: String.pad_leading(text, full)
  defp pad(text, _title, width, _full), do: String.pad_trailing(text, width)

  defp coloured({colour, _text}, padded), do: [colour, padded, :reset]
  defp coloured(_text, padded), do: padded

  defp widest(cells), do: cells |> Enum.map(&(&1 |> text() |> String.length())) |> Enum.max()

  defp text({_colour, text}), do: text
  defp text(text), do: text

  defp title({:right, title}), do: title
  defp title(title), do: title

  @doc """
  A whole number with commas.

      iex> Mix.Vllm.Table.whole(131_072)
      "131,072"
  """
  @spec whole(integer() | nil) :: String.t()
  def whole(nil), do: "?"

  def whole(number) do
    number |> Integer.to_string() |> String.replace(~r/(?<=\d)(?=(\d{3})+$)/, ",")
  end

  @doc "A number with so many decimals."
  @spec decimal(number(), non_neg_integer()) :: String.t()
  def decimal(number, decimals), do: :erlang.float_to_binary(number / 1, decimals: decimals)
end
