# What the notebooks use of Kino and Nx, in a few lines: the packages are not here.

defmodule Kino do
  def render(term), do: term

  @doc "A process that handles what `submit/2` sends."
  def listen(form, state, fun) do
    pid = spawn_link(fn -> loop(state, fun) end)
    Process.put(form, pid)
    pid
  end

  defp loop(state, fun) do
    receive do
      {:submit, data, from} ->
        {:cont, state} = fun.(%{type: :submit, data: data, origin: "client"}, state)
        send(from, :handled)
        loop(state, fun)
    end
  end

  @doc "Sends a form, for a test, and waits until it is handled."
  def submit(form, data) do
    send(Process.get(form), {:submit, data, self()})
    receive do: (:handled -> :ok)
  end
end

defmodule Kino.Text do
  defstruct [:text]
  def new(text, _options \\ []), do: %__MODULE__{text: text}
end

defmodule Kino.Markdown do
  defstruct [:text]
  def new(text, _options \\ []), do: %__MODULE__{text: text}
end

defmodule Kino.Frame do
  defstruct [:agent]

  def new do
    {:ok, agent} = Agent.start_link(fn -> [] end)
    %__MODULE__{agent: agent}
  end

  def append(frame, term), do: Agent.update(frame.agent, &(&1 ++ [term]))
  def render(frame, term), do: Agent.update(frame.agent, fn _shown -> [term] end)

  @doc "What a reader sees, for a test."
  def text(%__MODULE__{agent: agent}), do: Enum.map_join(Agent.get(agent, & &1), &text/1)
  def text(%{text: text}), do: text
end

defmodule Kino.Layout do
  def grid(terms, _options \\ []), do: terms
end

defmodule Kino.Input do
  defstruct [:label]
  def text(label), do: %__MODULE__{label: label}
end

defmodule Kino.Control do
  defstruct [:fields]
  def form(fields, _options), do: %__MODULE__{fields: fields}
end

# A tensor is a list of lists.
defmodule Nx do
  def from_binary(data, {:f, 32}), do: for(<<number::float-little-32 <- data>>, do: number)
  def reshape(vector, {_length}), do: vector
  def stack(vectors), do: vectors
  def shape([row | _] = rows), do: {length(rows), length(row)}
  def transpose(rows), do: Enum.zip_with(rows, & &1)

  def dot(rows, others) do
    columns = transpose(others)

    for row <- rows,
        do: for(column <- columns, do: Enum.sum(Enum.zip_with(row, column, &(&1 * &2))))
  end

  def argsort(rows, axis: 1, direction: :desc) do
    for row <- rows do
      row |> Enum.with_index() |> Enum.sort(:desc) |> Enum.map(&elem(&1, 1))
    end
  end

  def to_list(rows), do: rows
end
