defmodule VLLM.PoolingOutputsTest do
  # Not async: Nx is put in place of the one that is not there.
  use ExUnit.Case

  alias VLLM.{Classification, Embedding, Error, PoolingOutput, Score}

  doctest VLLM.Embedding
  doctest VLLM.PoolingOutput

  defp f32(numbers), do: for(number <- numbers, into: <<>>, do: <<number::32-float-little>>)

  defp wire(shape, numbers) do
    %{
      "request_id" => "7",
      "prompt_token_ids" => <<1::32-little, 2::32-little>>,
      "num_cached_tokens" => 0,
      "shape" => shape,
      "data" => f32(numbers)
    }
  end

  test "an embedding keeps the bytes of the wire" do
    assert %Embedding{request_id: "7", dimensions: 2, prompt_token_ids: [1, 2]} =
             embedding = Embedding.from_wire(wire([2], [0.25, -0.5]))

    assert embedding.data == f32([0.25, -0.5])
    assert Embedding.to_list(embedding) == [0.25, -0.5]
  end

  test "what Erlang has no float for is an atom" do
    data = <<0x7FC00000::32-little, 0x7F800000::32-little, 0xFF800000::32-little>>
    assert Embedding.to_list(%Embedding{data: data}) == [:nan, :infinity, :neg_infinity]
  end

  test "classes have names where the model has as many" do
    wire = wire([3], [0.25, 0.5, 0.25])

    assert %Classification{probs: [0.25, 0.5, 0.25], labels: ["a", "b", "c"], label: "b"} =
             Classification.from_wire(wire, ["a", "b", "c"])

    assert %Classification{labels: nil, label: nil} = Classification.from_wire(wire, ["a", "b"])
    assert %Classification{labels: nil, label: nil} = Classification.from_wire(wire, nil)
  end

  test "a score is a number, whatever its shape" do
    assert %Score{index: 3, score: 0.5} = Score.from_wire(wire([], [0.5]), 3)
    assert %Score{score: 0.5} = Score.from_wire(wire([1], [0.5]), 0)
  end

  test "a tensor becomes lists of its shape" do
    assert PoolingOutput.to_list(PoolingOutput.from_wire(wire([3, 2], [1, 2, 3, 4, 5, 6]))) ==
             [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]

    assert PoolingOutput.to_list(%PoolingOutput{shape: [0, 2], data: ""}) == []
  end

  test "Nx gets the bytes, the type and the shape, and is asked for where it is not there" do
    data = f32([1.0, 2.0])
    embedding = %Embedding{data: data}
    output = %PoolingOutput{shape: [1, 2], data: data}

    unless Code.ensure_loaded?(Nx) do
      for convert <- [fn -> Embedding.to_nx(embedding) end, fn -> PoolingOutput.to_nx(output) end] do
        assert %Error{reason: :unsupported, message: message} = assert_raise(Error, convert)
        assert message =~ "{:nx, "
      end

      Code.compile_string("""
      defmodule Nx do
        def from_binary(data, type), do: %{data: data, type: type}
        def reshape(tensor, shape), do: Map.put(tensor, :shape, shape)
      end
      """)

      on_exit(fn ->
        :code.purge(Nx)
        :code.delete(Nx)
      end)
    end

    assert %{shape: {2}} = Embedding.to_nx(embedding)
    assert %{shape: {1, 2}, type: {:f, 32}} = PoolingOutput.to_nx(output)
  end
end
