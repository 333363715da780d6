defmodule VLLM.Terminal do
  @moduledoc false
  # A line of progress that overwrites itself, for those who wait at a terminal.

  @doc """
  A function that shows a text on the terminal of the calling process, in place of the one before,
  and ends the line after the last. With `shown?` nil it does so in iex and in mix tasks that have a
  terminal; where it does not, the text is not even made.
  """
  @spec printer(boolean() | nil) :: ((() -> String.t()), :last | :more -> :ok)
  def printer(shown?) do
    shown? = if is_nil(shown?), do: columns() != nil and interactive?(), else: shown?
    if shown?, do: &print/2, else: fn _text, _which -> :ok end
  end

  @doc "How wide the terminal is; nil where there is none."
  @spec columns() :: pos_integer() | nil
  def columns do
    case :io.columns() do
      {:ok, columns} -> columns
      {:error, _no_terminal} -> nil
    end
  end

  defp interactive? do
    Enum.any?(Application.started_applications(), fn {app, _, _} -> app in [:iex, :mix] end)
  end

  defp print(text, which) do
    # Back to the start of the line, and clear it.
    IO.write("\r\e[K#{text.()}#{if which == :last, do: "\n"}")
  end
end
