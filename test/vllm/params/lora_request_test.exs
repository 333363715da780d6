defmodule VLLM.LoRARequestTest do
  use ExUnit.Case, async: true

  alias VLLM.{Error, LoRARequest}

  test "has the fields of vLLM's request, and travels whole" do
    request =
      VLLM.lora_request!("sql", 7, "/adapters/sql", base_model_name: "llama", load_inplace: true)

    assert request == %LoRARequest{
             lora_name: "sql",
             lora_int_id: 7,
             lora_path: "/adapters/sql",
             base_model_name: "llama",
             load_inplace: true,
             is_3d_lora_weight: false
           }

    assert {:ok, wire} = VLLM.Wire.encode(request)
    assert LoRARequest.from_wire(wire) == request
  end

  test "without an id gets one of name and path, always the same and below 2^31" do
    ids =
      for name <- ["a", "b"], path <- ["/a", "/b"] do
        id = VLLM.lora_request!(name, path).lora_int_id
        assert id == VLLM.lora_request!(name, path, base_model_name: "llama").lora_int_id
        assert id in 1..(2 ** 31 - 1)
        id
      end

    assert Enum.uniq(ids) == ids
  end

  test "folders are made absolute, hub ids stay as they are" do
    assert VLLM.lora_request!("a", "./adapters").lora_path == Path.expand("adapters")
    assert VLLM.lora_request!("a", "lib").lora_path == Path.expand("lib")
    assert VLLM.lora_request!("a", "someone/adapter").lora_path == "someone/adapter"
  end

  test "wrong arguments are errors" do
    for {name, path, options} <- [
          {"", "/a", []},
          {:a, "/a", []},
          {"a", nil, []},
          {"a", "/a", [lora_int_id: 0]},
          {"a", "/a", [load_inplace: 1]}
        ] do
      assert {:error, %Error{reason: :invalid_option}} = VLLM.lora_request(name, path, options)
    end

    assert {:error, %Error{details: %{"nearest" => "load_inplace"}}} =
             VLLM.lora_request("a", "/a", load_in_place: true)

    assert_raise Error, ~r/`lora_int_id` must be a positive integer/, fn ->
      VLLM.lora_request!("a", -1, "/a")
    end
  end

  test "only an adapter is taken for one" do
    assert {:error, %Error{reason: :invalid_option, message: message}} =
             VLLM.generate(:nobody, "x", lora_request: :sql)

    assert message =~ "`lora_request` must be an adapter from `VLLM.lora_request!/3`"
  end
end
