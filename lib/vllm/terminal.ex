defmodule VLLM.Terminal do
  @moduledoc false
  # A line of progress that overwrites itself, for those who wait at a terminal.

  @doc """
  Runs `fun` with a function that shows a text on the terminal of the calling process, in place of
  the one before, and ends the line after it. The function is given what makes the text.

  With `shown?` nil it is shown in iex and in mix tasks that have a terminal; where it is not, no text
  is made.
  """
  @spec line(boolean() | nil, (((() -> String.t()) -> :ok) -> result)) :: result
        when result: term()
  def line(shown?, fun) do
    shown? = if is_nil(shown?), do: columns() != nil and interactive?(), else: shown?
    if shown?, do: shown(fun), else: fun.(fn _text -> :ok end)
  end

  @doc "Runs `fun` below a line that says what is waited for, shown as `line/2` shows its own."
  @spec waiting(boolean() | nil, String.t(), (() -> result)) :: result when result: term()
  def waiting(shown?, text, fun) do
    line(shown?, fn show ->
      show.(fn -> text end)
      fun.()
    end)
  end

  @doc "How wide the terminal is; nil where there is none."
  @spec columns() :: pos_integer() | nil
  def columns do
    case :io.columns() do
      {:ok, columns} -> columns
      {:error, _no_terminal} -> nil
    end
  end

  @doc """
  A bar and words, as wide as so many `columns` allow; the words alone where there is no room, or no
  percentage.

      iex> VLLM.Terminal.bar(50, "half", 20)
      "[======       ] half"

      iex> VLLM.Terminal.bar(nil, "some", 20)
      "some"
  """
  @spec bar(0..100 | nil, String.t(), pos_integer()) :: String.t()
  def bar(nil, words, _columns), do: words

  def bar(percent, words, columns) do
    case min(columns - String.length(words) - 3, 30) do
      width when width >= 5 ->
        done = div(width * percent, 100)
        "[#{String.duplicate("=", done)}#{String.duplicate(" ", width - done)}] #{words}"

      _too_narrow ->
        words
    end
  end

  @doc """
  A time as people say it.

      iex> Enum.map([58.4, 94.5, 9_000], &VLLM.Terminal.time/1)
      ["58 s", "2 min", "2 h 30 min"]
  """
  @spec time(number()) :: String.t()
  def time(seconds) when seconds < 90, do: "#{round(seconds)} s"
  def time(seconds) when seconds < 5_400, do: "#{round(seconds / 60)} min"

  def time(seconds) do
    minutes = round(seconds / 60)
    "#{div(minutes, 60)} h #{rem(minutes, 60)} min"
  end

  defp interactive? do
    Enum.any?(Application.started_applications(), fn {app, _, _} -> app in [:iex, :mix] end)
  end

  defp shown(fun) do
    texts = :counters.new(1, [])

    try do
      fun.(fn text ->
        :counters.add(texts, 1, 1)
        # Back to the start of the line, and clear it.
        IO.write(["\r\e[K", text.()])
      end)
    after
      if :counters.get(texts, 1) > 0, do: IO.write("\n")
    end
  end
end
