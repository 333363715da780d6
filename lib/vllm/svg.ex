defmodule VLLM.SVG do
  @moduledoc false
  # What our pictures have in common: white ground, texts and numbers as SVG has them.

  @doc "A whole picture of this size."
  @spec document(pos_integer(), pos_integer(), iodata()) :: String.t()
  def document(width, height, body) do
    IO.iodata_to_binary([
      ~s(<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 #{width} #{height}" ),
      ~s(font-family="sans-serif" font-size="12" fill="#333">\n),
      ~s(<rect width="#{width}" height="#{height}" fill="#fff"/>\n),
      body,
      "</svg>\n"
    ])
  end

  @doc "A text at a place; `anchor` is `\"start\"`, `\"middle\"` or `\"end\"`."
  @spec text(number(), number(), String.t(), String.t()) :: iodata()
  def text(x, y, text, anchor),
    do: [~s(<text x="#{at(x)}" y="#{at(y)}" text-anchor="#{anchor}">), escape(text), "</text>\n"]

  @doc "A line from one place to another."
  @spec line({number(), number()}, {number(), number()}, String.t()) :: iodata()
  def line({x1, y1}, {x2, y2}, stroke) do
    ~s(<line x1="#{at(x1)}" y1="#{at(y1)}" x2="#{at(x2)}" y2="#{at(y2)}" stroke="#{stroke}"/>\n)
  end

  @doc "A line through several places."
  @spec curve([{number(), number()}], String.t()) :: iodata()
  def curve(places, stroke) do
    points = Enum.map_join(places, " ", fn {x, y} -> "#{at(x)},#{at(y)}" end)
    ~s(<polyline points="#{points}" fill="none" stroke="#{stroke}" stroke-width="1.5"/>\n)
  end

  @doc "A dot, which shows its title to whoever points at it."
  @spec dot({number(), number()}, String.t(), String.t() | nil) :: iodata()
  def dot({x, y}, fill, title \\ nil) do
    circle = ~s(<circle cx="#{at(x)}" cy="#{at(y)}" r="4" fill="#{fill}")

    if title,
      do: [circle, "><title>", escape(title), "</title></circle>\n"],
      else: [circle, "/>\n"]
  end

  @doc """
  A coordinate.

      iex> VLLM.SVG.at(3)
      "3.0"
  """
  @spec at(number()) :: String.t()
  def at(number), do: :erlang.float_to_binary(number / 1, decimals: 1)

  @doc """
  A text as XML has it.

      iex> VLLM.SVG.escape("a < b & c")
      "a &lt; b &amp; c"
  """
  @spec escape(String.t()) :: String.t()
  def escape(text) do
    for <<char::utf8 <- text>>, into: "" do
      case char do
        ?& -> "&amp;"
        ?< -> "&lt;"
        ?> -> "&gt;"
        # No control characters are allowed in XML.
        char when char < 0x20 -> " "
        char -> <<char::utf8>>
      end
    end
  end
end
