defmodule VLLM.HEEx do
  @moduledoc "Phoenix's templates, as the text that they are: the package is not here."

  defmacro sigil_H({:<<>>, _meta, [template]}, _modifiers) do
    quote do
      _ = var!(assigns)
      unquote(template)
    end
  end
end
